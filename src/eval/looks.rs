//! What an image looks like by itself: how sharp, how bright, how colourful.

use image::RgbImage;
use image::imageops::{FilterType, resize};

/// Images are compared in sharpness at this length of the longer side.
const SHARPNESS_SIDE: u32 = 512;

/// Simple statistics of one image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Looks {
    /// Variance of the Laplacian of the grey image (0 to 255) at a longer side of 512 pixels. Photos in focus have
    /// hundreds, blurred ones less than about 100.
    pub sharpness: f64,
    /// Mean luma, 0 to 1.
    pub brightness: f64,
    /// Standard deviation of the luma, 0 to 0.5.
    pub contrast: f64,
    /// Mean saturation (HSV), 0 to 1.
    pub saturation: f64,
    /// Hasler and Süsstrunk, "Measuring colourfulness in natural images" (2003): about 0 for grey, 109 for extreme.
    pub colourfulness: f64,
}

impl Looks {
    /// Of an image with pixels.
    pub fn of(image: &RgbImage) -> Self {
        let n = f64::from(image.width()) * f64::from(image.height());
        let (mut saturation, mut sums) = (0.0, [(0.0, 0.0); 3]);
        for pixel in image.pixels() {
            let [r, g, b] = pixel.0.map(f64::from);
            let (low, high) = (r.min(g).min(b), r.max(g).max(b));
            saturation += if high > 0.0 { (high - low) / high } else { 0.0 };
            for (sum, value) in sums.iter_mut().zip([luma(pixel.0), r - g, 0.5 * (r + g) - b]) {
                *sum = (sum.0 + value, sum.1 + value * value);
            }
        }
        let moments = sums.map(|(sum, squares)| (sum / n, (squares / n - (sum / n).powi(2)).max(0.0)));
        let [(brightness, contrast), red_green, yellow_blue] = moments;
        let spread = (red_green.1 + yellow_blue.1).sqrt();
        let centre = (red_green.0.powi(2) + yellow_blue.0.powi(2)).sqrt();
        Self {
            sharpness: sharpness(image),
            brightness: brightness / 255.0,
            contrast: contrast.sqrt() / 255.0,
            saturation: saturation / n,
            colourfulness: spread + 0.3 * centre,
        }
    }
}

/// Rec. 601 luma, 0 to 255.
fn luma([r, g, b]: [u8; 3]) -> f64 {
    0.299 * f64::from(r) + 0.587 * f64::from(g) + 0.114 * f64::from(b)
}

fn sharpness(image: &RgbImage) -> f64 {
    let longer = image.width().max(image.height());
    let resized;
    let image = if longer == SHARPNESS_SIDE {
        image
    } else {
        let side = |n: u32| (f64::from(n) * f64::from(SHARPNESS_SIDE) / f64::from(longer)).round().max(1.0) as u32;
        resized = resize(image, side(image.width()), side(image.height()), FilterType::Triangle);
        &resized
    };
    let (width, height) = (image.width() as usize, image.height() as usize);
    let grey: Vec<f64> = image.pixels().map(|p| luma(p.0)).collect();
    // Mirrored at the border without repeating it.
    let mirror = |i: isize, n: usize| {
        let last = n as isize - 1;
        if last == 0 { 0 } else { (last - (last - i.abs()).abs()) as usize }
    };
    let at = |x: isize, y: isize| grey[mirror(y, height) * width + mirror(x, width)];
    let (mut sum, mut squares) = (0.0, 0.0);
    for y in 0..height as isize {
        for x in 0..width as isize {
            let laplacian = at(x - 1, y) + at(x + 1, y) + at(x, y - 1) + at(x, y + 1) - 4.0 * at(x, y);
            sum += laplacian;
            squares += laplacian * laplacian;
        }
    }
    let n = (width * height) as f64;
    squares / n - (sum / n).powi(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn plain_colours_have_known_statistics() {
        let red = Looks::of(&RgbImage::from_pixel(20, 10, Rgb([255, 0, 0])));
        assert!((red.brightness - 0.299).abs() < 1e-9 && red.contrast < 1e-6 && red.sharpness < 1e-9);
        assert_eq!(red.saturation, 1.0);
        // Means of red-green and yellow-blue are 255 and 127.5.
        assert!((red.colourfulness - 0.3 * 255.0 * 1.25f64.sqrt()).abs() < 1e-9);
        assert_eq!(Looks::of(&RgbImage::from_pixel(1, 1, Rgb([9, 9, 9]))).colourfulness, 0.0);
        let half = Looks::of(&RgbImage::from_fn(20, 20, |x, _| Rgb([if x < 10 { 0 } else { 255 }; 3])));
        assert!((half.brightness - 0.5).abs() < 1e-9 && (half.contrast - 0.5).abs() < 1e-9);
    }

    #[test]
    fn a_chequered_board_has_the_laplacian_of_its_steps() {
        // Every neighbour, mirrored ones too, differs by 100: the Laplacian is +-400.
        let board = RgbImage::from_fn(512, 512, |x, y| Rgb([((x + y) % 2 * 100) as u8; 3]));
        assert!((Looks::of(&board).sharpness - 160_000.0).abs() < 1e-6);
    }
}
