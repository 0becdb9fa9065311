//! Where objects lie and what their outlines are.

use crate::rng::Stream;
use crate::world::canvas::{Form, Point};
use crate::world::{Place, SIDE, Shape};
use serde::{Deserialize, Serialize};
use std::f32::consts::{PI, TAU};

/// An object in the picture.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Object {
    /// What it is.
    pub shape: Shape,
    /// Middle of its outline's circle, in pixels.
    pub at: Point,
    /// About its width, in pixels.
    pub size: f32,
    /// Clockwise, in degrees.
    pub tilt: f32,
}

/// Uniform in [low, high).
pub fn between(stream: &mut Stream, low: f32, high: f32) -> f32 {
    low + (high - low) * stream.uniform() as f32
}

/// Sizes for one to four objects: at least 22 pixels, the more the fewer there are.
const SIZES: [[f32; 2]; 4] = [[29.0, 34.0], [26.0, 30.0], [24.0, 27.0], [22.0, 24.0]];

/// Distance between the middles of neighbours for two to four in a line.
const PITCH: [f32; 4] = [0.0, 42.0, 35.0, 30.0];

/// `count` (1 to 4) objects that do not touch: a column on the left and right, a row at the top and bottom, a row, a
/// triangle or a square in the centre.
pub fn place(count: usize, shape: Shape, place: Place, stream: &mut Stream) -> Vec<Object> {
    let size = between(stream, SIZES[count - 1][0], SIZES[count - 1][1]);
    let pitch = PITCH[count - 1];
    let line = |i: usize| (i as f32 - (count as f32 - 1.0) / 2.0) * pitch;
    let offset = |i: usize| -> Point {
        match (place, count) {
            (Place::Left | Place::Right, _) => [0.0, line(i)],
            (Place::Top | Place::Bottom, _) | (Place::Centre, 1 | 2) => [line(i), 0.0],
            (Place::Centre, 3) => [[-18.5, 13.0], [18.5, 13.0], [0.0, -17.0]][i],
            (Place::Centre, _) => [[-17.0, -17.0], [17.0, -17.0], [-17.0, 17.0], [17.0, 17.0]][i],
        }
    };
    let middle = place.middle().map(|part| part * SIDE as f32);
    let middle = middle.map(|v| v + between(stream, -3.0, 3.0));
    let mut object = |i: usize| Object {
        shape,
        at: [0, 1].map(|axis| middle[axis] + offset(i)[axis] + between(stream, -1.0, 1.0)),
        size,
        tilt: between(stream, -6.0, 6.0),
    };
    (0..count).map(&mut object).collect()
}

impl Object {
    /// Its outline.
    pub fn form(&self) -> Form {
        let half = self.size / 2.0;
        // Around the origin, for a half width of 1.
        let points: Vec<Point> = match self.shape {
            Shape::Circle => return Form::disc(self.at, half),
            Shape::Square => [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]].into(),
            Shape::Triangle => ring(3, |_| 1.25).into_iter().map(|[x, y]| [x, y + 0.25]).collect(),
            Shape::Star => ring(10, |i| if i % 2 == 0 { 1.2 } else { 0.5 }),
            Shape::Heart => (0..48).map(|i| heart(TAU * i as f32 / 48.0)).collect(),
        };
        let (sin, cos) = (self.tilt * PI / 180.0).sin_cos();
        let turned = |[x, y]: Point| [self.at[0] + half * (x * cos - y * sin), self.at[1] + half * (x * sin + y * cos)];
        Form::Polygon(points.into_iter().map(turned).collect())
    }
}

/// `n` points around the origin, the first one at the top.
fn ring(n: usize, radius: impl Fn(usize) -> f32) -> Vec<Point> {
    let point = |i: usize| {
        let angle = TAU * i as f32 / n as f32;
        [radius(i) * angle.sin(), -radius(i) * angle.cos()]
    };
    (0..n).map(point).collect()
}

/// The usual heart curve, about 2.1 wide and 1.9 high.
fn heart(t: f32) -> Point {
    let x = 16.0 * t.sin().powi(3);
    let y = 13.0 * t.cos() - 5.0 * (2.0 * t).cos() - 2.0 * (3.0 * t).cos() - (4.0 * t).cos();
    [x / 15.0, -(y + 2.5) / 15.0]
}
