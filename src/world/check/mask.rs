//! Pixels that belong together.

use crate::world::SIDE;
use crate::world::canvas::{Point, Rgb};
use image::RgbImage;

/// One truth for each pixel of a picture, row by row.
pub type Mask = Vec<bool>;

/// A picture's pixels as sRGB from 0 to 255, row by row.
pub fn pixels(image: &RgbImage) -> Vec<Rgb> {
    image.pixels().map(|p| p.0.map(f32::from)).collect()
}

/// The colour of the ground: the median of a frame of three pixels, channel by channel.
pub fn ground(pixels: &[Rgb]) -> Rgb {
    let in_frame = |i: &usize| {
        let (x, y) = (i % SIDE, i / SIDE);
        x.min(y).min(SIDE - 1 - x).min(SIDE - 1 - y) < 3
    };
    [0, 1, 2].map(|channel| {
        let mut values: Vec<f32> = (0..pixels.len()).filter(in_frame).map(|i| pixels[i][channel]).collect();
        values.sort_by(f32::total_cmp);
        values[values.len() / 2]
    })
}

/// Euclidean distance of two colours.
pub fn distance(a: Rgb, b: Rgb) -> f32 {
    (0..3).map(|c| (a[c] - b[c]).powi(2)).sum::<f32>().sqrt()
}

/// The pixels at `i`'s sides and corners.
pub fn neighbours(i: usize) -> impl Iterator<Item = usize> {
    let (x, y) = ((i % SIDE) as isize, (i / SIDE) as isize);
    let steps = (-1..=1).flat_map(|dy| (-1..=1).map(move |dx| (dx, dy))).filter(|&step| step != (0, 0));
    let side = SIDE as isize;
    steps
        .map(move |(dx, dy)| (x + dx, y + dy))
        .filter(move |&(x, y)| (0..side).contains(&x) && (0..side).contains(&y))
        .map(|(x, y)| y as usize * SIDE + x as usize)
}

/// A connected set of pixels.
#[derive(Clone, Debug)]
pub struct Component {
    /// Their indices.
    pub pixels: Vec<usize>,
}

impl Component {
    /// Number of pixels.
    pub fn area(&self) -> usize {
        self.pixels.len()
    }

    /// Mean position, of pixel middles.
    pub fn centre(&self) -> Point {
        let n = self.pixels.len() as f32;
        let sum = |of: fn(usize) -> usize| self.pixels.iter().map(|&i| of(i) as f32 + 0.5).sum::<f32>() / n;
        [sum(|i| i % SIDE), sum(|i| i / SIDE)]
    }

    /// As a mask.
    pub fn mask(&self) -> Mask {
        let mut mask = vec![false; SIDE * SIDE];
        self.pixels.iter().for_each(|&i| mask[i] = true);
        mask
    }

    /// With everything that it encloses.
    pub fn filled(&self) -> Mask {
        let own = self.mask();
        let outside: Mask = own.iter().map(|inside| !inside).collect();
        let mut filled = vec![true; SIDE * SIDE];
        for part in components(&outside) {
            if part
                .pixels
                .iter()
                .any(|i| i % SIDE == 0 || i % SIDE == SIDE - 1 || i / SIDE == 0 || i / SIDE == SIDE - 1)
            {
                part.pixels.iter().for_each(|&i| filled[i] = false);
            }
        }
        filled
    }
}

/// The components of a mask, with pixels at sides and corners as neighbours; the largest first.
pub fn components(mask: &[bool]) -> Vec<Component> {
    let mut seen = vec![false; mask.len()];
    let mut found = Vec::new();
    for start in 0..mask.len() {
        if !mask[start] || seen[start] {
            continue;
        }
        seen[start] = true;
        let mut pixels = vec![start];
        let mut next = 0;
        while next < pixels.len() {
            for i in neighbours(pixels[next]) {
                if mask[i] && !seen[i] {
                    seen[i] = true;
                    pixels.push(i);
                }
            }
            next += 1;
        }
        found.push(Component { pixels });
    }
    found.sort_by_key(|c| std::cmp::Reverse(c.area()));
    found
}

/// A mask with its neighbours, `times` over.
pub fn grown(mask: &[bool], times: usize) -> Mask {
    let mut mask = mask.to_vec();
    for _ in 0..times {
        mask = (0..mask.len()).map(|i| mask[i] || neighbours(i).any(|j| mask[j])).collect();
    }
    mask
}

/// Hue in degrees, saturation and value from 0 to 1.
pub fn hsv([r, g, b]: Rgb) -> [f32; 3] {
    let (high, low) = (r.max(g).max(b), r.min(g).min(b));
    let chroma = high - low;
    if chroma <= 0.0 {
        return [0.0, 0.0, high / 255.0];
    }
    let sextant = if high == r {
        ((g - b) / chroma).rem_euclid(6.0)
    } else if high == g {
        (b - r) / chroma + 2.0
    } else {
        (r - g) / chroma + 4.0
    };
    [60.0 * sextant, chroma / high, high / 255.0]
}
