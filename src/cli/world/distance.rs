//! How far generated pictures as a whole are from drawn ones of the same scenes.

use crate::error::Result;
use crate::eval::distance::frechet;
use crate::eval::singular::Matrix;
use crate::world::{Drawing, SIDE, Scene, Style};
use image::RgbImage;
use serde_json::{Value, json};

/// Cells on a side of the grid.
const CELLS: usize = 8;
/// Mean red, green and blue of every cell.
const FEATURES: usize = CELLS * CELLS * 3;

/// Seeds of the two sets of drawings; `world draw` takes small numbers.
const DRAWN: u64 = 1 << 40;
const DRAWN_AGAIN: u64 = DRAWN + 1;

/// Collects pictures for a Fréchet distance over the mean colours of an 8x8 grid: for so plain a world these are what
/// there is to see, and 500 pictures are enough for 192 numbers. It is no FID: that takes InceptionV3 (`qwen-lora eval`).
pub struct Distance {
    style: Style,
    made: Vec<f64>,
    drawn: Vec<f64>,
    again: Vec<f64>,
}

impl Distance {
    /// To drawings in `style`.
    pub fn to(style: Style) -> Self {
        Self { style, made: Vec::new(), drawn: Vec::new(), again: Vec::new() }
    }

    /// Adds picture `number`, which was to show `scene`.
    pub fn add(&mut self, image: &RgbImage, scene: Scene, number: usize) {
        let drawing = |seed| Drawing::new(scene, self.style, seed, number as u64).render();
        self.drawn.extend(features(&drawing(DRAWN)));
        self.again.extend(features(&drawing(DRAWN_AGAIN)));
        self.made.extend(features(image));
    }

    /// The distance of the pictures from drawings, and of these from other drawings of the same scenes: as near as it
    /// gets. `None` for fewer than two pictures.
    pub fn measure(self) -> Result<Option<[f64; 2]>> {
        let matrix = |values: Vec<f64>| Matrix::new(values.len() / FEATURES, FEATURES, values);
        let drawn = matrix(self.drawn);
        let [made, again] = [self.made, self.again].map(|values| frechet(&matrix(values), &drawn));
        Ok(made?.zip(again?).map(|(made, again)| [made, again]))
    }
}

/// The distances as JSON.
pub fn to_json(distances: Option<[f64; 2]>) -> Value {
    distances.map_or(Value::Null, |[made, drawn]| json!({"to_drawn": made, "of_drawn_to_drawn": drawn}))
}

/// Mean colours of the grid, from 0 to 1.
fn features(image: &RgbImage) -> [f64; FEATURES] {
    let mut sums = [0.0; FEATURES];
    let cell = SIDE / CELLS;
    for (x, y, pixel) in image.enumerate_pixels() {
        let at = (y as usize / cell * CELLS + x as usize / cell) * 3;
        for (sum, value) in sums[at..].iter_mut().zip(pixel.0) {
            *sum += f64::from(value) / 255.0 / (cell * cell) as f64;
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{Split, split::Pool};

    /// Pictures of a style are nearer to drawings of that style than to others, and drawings of other seeds are as near
    /// as drawings get.
    #[test]
    fn drawings_are_near_drawings_of_their_own_style() {
        let pool = Pool::new(Split::HeldOut, crate::world::Kind::All);
        let measure = |made: Style, reference: Style| {
            let mut distance = Distance::to(reference);
            for number in 0..120 {
                let scene = pool.draw(5, number);
                distance.add(&Drawing::new(scene, made, 5, number).render(), scene, number as usize);
            }
            distance.measure().unwrap().unwrap()
        };
        let [own, floor] = measure(Style::Plain, Style::Plain);
        assert!((own / floor - 1.0).abs() < 0.3, "{own} {floor}");
        let [other, _] = measure(Style::Ink, Style::Plain);
        assert!(other > 3.0 * own, "{other} {own}");
        let [hats, _] = measure(Style::Hat, Style::Hat);
        let [bare, _] = measure(Style::Plain, Style::Hat);
        assert!(bare > hats, "{bare} {hats}");
    }
}
