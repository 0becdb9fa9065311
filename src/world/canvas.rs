//! Anti-aliased drawing: forms are painted on a grid several times as fine as the picture, which is then averaged down.
//! Coordinates are pixels of the picture, x to the right, y down, (0, 0) its upper left corner.

use crate::world::SIDE;
use image::RgbImage;

/// Fine cells per pixel and axis.
const FINE: usize = 4;

/// A point in pixels.
pub type Point = [f32; 2];

/// sRGB, 0 to 255.
pub type Rgb = [f32; 3];

/// A picture in the making.
pub struct Canvas {
    cells: Vec<Rgb>,
}

/// A form that can be painted.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// All points within `radius` of the line from `from` to `to`; a disc if these are equal.
    Capsule {
        /// One end.
        from: Point,
        /// The other end.
        to: Point,
        /// Half the width.
        radius: f32,
    },
    /// The inside of a closed line, by the even-odd rule.
    Polygon(Vec<Point>),
}

impl Form {
    /// A disc.
    pub fn disc(at: Point, radius: f32) -> Self {
        Self::Capsule { from: at, to: at, radius }
    }

    /// Whether the point is inside.
    pub fn contains(&self, [x, y]: Point) -> bool {
        match self {
            Self::Capsule { from, to, radius } => distance_to_line([x, y], *from, *to) <= *radius,
            Self::Polygon(points) => {
                let mut inside = false;
                for (i, &[x1, y1]) in points.iter().enumerate() {
                    let [x0, y0] = points[(i + points.len() - 1) % points.len()];
                    if (y0 > y) != (y1 > y) && x < (x1 - x0) * (y - y0) / (y1 - y0) + x0 {
                        inside = !inside;
                    }
                }
                inside
            }
        }
    }

    /// What lies within `by` of the form, as several forms.
    pub fn grown(&self, by: f32) -> Vec<Self> {
        match self {
            Self::Capsule { from, to, radius } => {
                vec![Self::Capsule { from: *from, to: *to, radius: radius + by }]
            }
            Self::Polygon(points) => {
                let edge = |(i, &to): (usize, &Point)| {
                    let from = points[(i + points.len() - 1) % points.len()];
                    Self::Capsule { from, to, radius: by }
                };
                points.iter().enumerate().map(edge).chain([self.clone()]).collect()
            }
        }
    }

    /// Smallest x and y, largest x and y.
    fn bounds(&self) -> [f32; 4] {
        let (points, margin) = match self {
            Self::Capsule { from, to, radius } => (&[*from, *to][..], *radius),
            Self::Polygon(points) => (points.as_slice(), 0.0),
        };
        let start = [f32::INFINITY, f32::INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY];
        points.iter().fold(start, |[l, t, r, b], &[x, y]| {
            [l.min(x - margin), t.min(y - margin), r.max(x + margin), b.max(y + margin)]
        })
    }
}

/// Distance of `p` from the line between `a` and `b`.
pub fn distance_to_line(p: Point, a: Point, b: Point) -> f32 {
    let along = [b[0] - a[0], b[1] - a[1]];
    let offset = [p[0] - a[0], p[1] - a[1]];
    let squared = along[0] * along[0] + along[1] * along[1];
    let t = if squared > 0.0 { ((offset[0] * along[0] + offset[1] * along[1]) / squared).clamp(0.0, 1.0) } else { 0.0 };
    (offset[0] - t * along[0]).hypot(offset[1] - t * along[1])
}

impl Canvas {
    /// An empty picture.
    pub fn new(background: Rgb) -> Self {
        Self { cells: vec![background; (SIDE * FINE).pow(2)] }
    }

    /// Paints the inside of a form; `colour` is asked for each point.
    pub fn paint(&mut self, form: &Form, colour: impl Fn(Point) -> Rgb) {
        let side = SIDE * FINE;
        let [left, top, right, bottom] = form.bounds();
        let cells = |low: f32, high: f32| {
            let cell = |v: f32| (v * FINE as f32).clamp(0.0, side as f32) as usize;
            cell(low)..(cell(high) + 1).min(side)
        };
        for row in cells(top, bottom) {
            for column in cells(left, right) {
                let point = [(column as f32 + 0.5) / FINE as f32, (row as f32 + 0.5) / FINE as f32];
                if form.contains(point) {
                    self.cells[row * side + column] = colour(point);
                }
            }
        }
    }

    /// The picture.
    pub fn finish(&self) -> RgbImage {
        RgbImage::from_fn(SIDE as u32, SIDE as u32, |x, y| {
            let mut sum = [0f32; 3];
            for row in 0..FINE {
                let start = (y as usize * FINE + row) * SIDE * FINE + x as usize * FINE;
                for cell in &self.cells[start..start + FINE] {
                    (0..3).for_each(|c| sum[c] += cell[c]);
                }
            }
            image::Rgb(sum.map(|v| (v / (FINE * FINE) as f32).round() as u8))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Area of what is black on white, in pixels.
    fn area(form: &Form) -> f32 {
        let mut canvas = Canvas::new([255.0; 3]);
        canvas.paint(form, |_| [0.0; 3]);
        canvas.finish().pixels().map(|p| 1.0 - f32::from(p.0[0]) / 255.0).sum()
    }

    #[test]
    fn forms_have_their_areas() {
        let pi = std::f32::consts::PI;
        for (form, expected) in [
            (Form::disc([64.3, 60.1], 12.0), pi * 144.0),
            (Form::Capsule { from: [20.0, 30.0], to: [50.0, 70.0], radius: 3.0 }, 50.0 * 6.0 + pi * 9.0),
            (Form::Polygon(vec![[10.0, 10.0], [40.0, 10.0], [10.0, 50.0]]), 600.0),
            // Half of it is outside the picture.
            (Form::disc([0.0, 64.0], 10.0), pi * 50.0),
        ] {
            let found = area(&form);
            assert!((found - expected).abs() < 0.01 * expected, "{form:?}: {found}, {expected}");
        }
    }

    #[test]
    fn growing_adds_a_rim() {
        let square = Form::Polygon(vec![[40.0, 40.0], [60.0, 40.0], [60.0, 60.0], [40.0, 60.0]]);
        let mut canvas = Canvas::new([255.0; 3]);
        square.grown(2.0).iter().for_each(|form| canvas.paint(form, |_| [0.0; 3]));
        let found: f32 = canvas.finish().pixels().map(|p| 1.0 - f32::from(p.0[0]) / 255.0).sum();
        let expected = 400.0 + 160.0 + std::f32::consts::PI * 4.0;
        assert!((found - expected).abs() < 4.0, "{found}, {expected}");
    }
}
