//! How alike two images of one size are: PSNR, two variants of SSIM, and MS-SSIM. All on 8-bit RGB, data range 255.
//!
//! The published numbers called SSIM differ by window and by what is done with colour, so each variant has its name.
//! Source: Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004); variants as in
//! <https://github.com/scikit-image/scikit-image/blob/v0.25.2/skimage/metrics/_structural_similarity.py>, MS-SSIM as in
//! <https://github.com/VainF/pytorch-msssim/blob/v1.0.0/pytorch_msssim/ssim.py>.

use image::RgbImage;
use rayon::prelude::*;

/// `(0.01 * 255)^2`, which keeps the comparison of dark regions stable.
const C1: f64 = 6.5025;
/// `(0.03 * 255)^2`, the same for flat regions.
const C2: f64 = 58.5225;

/// Weights of the scales of MS-SSIM, finest first.
const SCALES: [f64; 5] = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333];

/// MS-SSIM wants sides longer than this: its window has 11 pixels and the coarsest scale is a sixteenth.
pub const MS_SSIM_SIDE: u32 = 160;

/// How local means and variances are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// 7x7 pixels of equal weight, sample variances (divided by n - 1): scikit-image's default.
    Uniform7,
    /// Gaussian weights of sigma 1.5 over 11x11 pixels, variances divided by n: the original paper's.
    Gaussian11,
}

impl Window {
    /// Weights along one axis, with sum 1.
    fn weights(self) -> Vec<f64> {
        match self {
            Self::Uniform7 => vec![1.0 / 7.0; 7],
            Self::Gaussian11 => {
                let bell: Vec<f64> = (-5..=5).map(|i| (-f64::from(i * i) / (2.0 * 1.5 * 1.5)).exp()).collect();
                let sum: f64 = bell.iter().sum();
                bell.iter().map(|w| w / sum).collect()
            }
        }
    }

    /// Factor on variances.
    fn norm(self) -> f64 {
        match self {
            Self::Uniform7 => 49.0 / 48.0,
            Self::Gaussian11 => 1.0,
        }
    }

    /// Shortest side that the window fits on.
    pub fn side(self) -> u32 {
        match self {
            Self::Uniform7 => 7,
            Self::Gaussian11 => 11,
        }
    }
}

/// Peak signal-to-noise ratio in dB over all pixels and channels; infinite for equal images. Sizes must be equal.
pub fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    10.0 * (255.0f64.powi(2) / mean_squared_error(a, b)).log10()
}

/// Root mean square difference over all pixels and channels, as a share of the range: 0 for equal images, at most 1.
pub fn rms_difference(a: &RgbImage, b: &RgbImage) -> f64 {
    mean_squared_error(a, b).sqrt() / 255.0
}

fn mean_squared_error(a: &RgbImage, b: &RgbImage) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions(), "callers compare images of one size");
    let square = |(a, b): (&u8, &u8)| u64::from(a.abs_diff(*b)).pow(2);
    a.as_raw().iter().zip(b.as_raw()).map(square).sum::<u64>() as f64 / a.as_raw().len() as f64
}

/// Structural similarity, the mean over pixels whose window lies inside the image, then over the three channels.
/// `None` if the images are smaller than the window. Sizes must be equal.
pub fn ssim(a: &RgbImage, b: &RgbImage, window: Window) -> Option<f64> {
    assert_eq!(a.dimensions(), b.dimensions(), "callers compare images of one size");
    if a.width().min(a.height()) < window.side() {
        return None;
    }
    let channel = |c| Plane::of(a, c).compare(&Plane::of(b, c), window).0;
    Some((0..3).into_par_iter().map(channel).collect::<Vec<_>>().iter().sum::<f64>() / 3.0)
}

/// SSIM over five scales (Wang, Simoncelli, Bovik 2003): contrast and structure at each, luminance at the coarsest.
/// `None` unless both sides are longer than [`MS_SSIM_SIDE`]. Sizes must be equal.
pub fn ms_ssim(a: &RgbImage, b: &RgbImage) -> Option<f64> {
    assert_eq!(a.dimensions(), b.dimensions(), "callers compare images of one size");
    if a.width().min(a.height()) <= MS_SSIM_SIDE {
        return None;
    }
    let channel = |c| {
        let (mut a, mut b) = (Plane::of(a, c), Plane::of(b, c));
        let mut product = 1.0;
        for (i, &weight) in SCALES.iter().enumerate() {
            let (ssim, structure) = a.compare(&b, Window::Gaussian11);
            let last = i + 1 == SCALES.len();
            product *= (if last { ssim } else { structure }).max(0.0).powf(weight);
            if !last {
                (a, b) = (a.halved(), b.halved());
            }
        }
        product
    };
    Some((0..3).into_par_iter().map(channel).collect::<Vec<_>>().iter().sum::<f64>() / 3.0)
}

/// One channel.
struct Plane {
    width: usize,
    height: usize,
    values: Vec<f64>,
}

impl Plane {
    fn of(image: &RgbImage, channel: usize) -> Self {
        let values = image.as_raw().iter().skip(channel).step_by(3).map(|&v| f64::from(v)).collect();
        Self { width: image.width() as usize, height: image.height() as usize, values }
    }

    /// The means over all windows of SSIM and of its contrast-structure part.
    fn compare(&self, other: &Plane, window: Window) -> (f64, f64) {
        let weights = window.weights();
        let mean = |f: &dyn Fn(f64, f64) -> f64| {
            let values = self.values.iter().zip(&other.values).map(|(&x, &y)| f(x, y)).collect();
            Plane { values, ..*self }.filtered(&weights).values
        };
        let (x, y) = (mean(&|x, _| x), mean(&|_, y| y));
        let (xx, yy, xy) = (mean(&|x, _| x * x), mean(&|_, y| y * y), mean(&|x, y| x * y));
        let (mut ssim, mut structure) = (0.0, 0.0);
        for i in 0..x.len() {
            let variance = |xx: f64, x: f64, y: f64| window.norm() * (xx - x * y);
            let (vx, vy, vxy) = (variance(xx[i], x[i], x[i]), variance(yy[i], y[i], y[i]), variance(xy[i], x[i], y[i]));
            let cs = (2.0 * vxy + C2) / (vx + vy + C2);
            structure += cs;
            ssim += cs * (2.0 * x[i] * y[i] + C1) / (x[i] * x[i] + y[i] * y[i] + C1);
        }
        (ssim / x.len() as f64, structure / x.len() as f64)
    }

    /// Weighted means along both axes, where the window lies inside.
    fn filtered(&self, weights: &[f64]) -> Plane {
        let (width, height) = (self.width + 1 - weights.len(), self.height + 1 - weights.len());
        let mut rows = vec![0.0; width * self.height];
        for (row, out) in self.values.chunks_exact(self.width).zip(rows.chunks_exact_mut(width)) {
            for (shift, &w) in weights.iter().enumerate() {
                out.iter_mut().zip(&row[shift..]).for_each(|(o, v)| *o += w * v);
            }
        }
        let mut values = vec![0.0; width * height];
        for (y, out) in values.chunks_exact_mut(width).enumerate() {
            for (row, &w) in rows[y * width..].chunks_exact(width).zip(weights) {
                out.iter_mut().zip(row).for_each(|(o, v)| *o += w * v);
            }
        }
        Plane { width, height, values }
    }

    /// Means of 2x2 pixels. An odd side gets a line of zeros before and one after it, as in the source.
    fn halved(&self) -> Plane {
        let (pad_x, pad_y) = (self.width % 2, self.height % 2);
        let (width, height) = ((self.width + 2 * pad_x) / 2, (self.height + 2 * pad_y) / 2);
        let at = |x: usize, y: usize| {
            let (x, y) = (x.wrapping_sub(pad_x), y.wrapping_sub(pad_y));
            if x < self.width && y < self.height { self.values[y * self.width + x] } else { 0.0 }
        };
        let mean = |x: usize, y: usize| (at(x, y) + at(x + 1, y) + at(x, y + 1) + at(x + 1, y + 1)) / 4.0;
        let values = (0..height).flat_map(|y| (0..width).map(move |x| mean(2 * x, 2 * y))).collect();
        Plane { width, height, values }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_images_are_alike_and_small_ones_are_not_measured() {
        let image = RgbImage::from_fn(12, 11, |x, y| image::Rgb([(x * 20) as u8, (y * 20) as u8, 7]));
        assert_eq!(psnr(&image, &image), f64::INFINITY);
        assert_eq!(rms_difference(&image, &image), 0.0);
        for window in [Window::Uniform7, Window::Gaussian11] {
            assert!((ssim(&image, &image, window).unwrap() - 1.0).abs() < 1e-12);
        }
        let small = RgbImage::new(12, 10);
        assert_eq!(ssim(&small, &small, Window::Gaussian11), None);
        assert_eq!(ms_ssim(&image, &image), None);
        let (black, white) = (RgbImage::new(3, 3), RgbImage::from_pixel(3, 3, image::Rgb([255; 3])));
        assert_eq!((psnr(&black, &white), rms_difference(&black, &white)), (0.0, 1.0));
    }
}
