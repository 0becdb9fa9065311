//! How a scene is painted. The base is trained on the plain style alone; the others are what an adapter can learn.

use crate::world::canvas::{Canvas, Form, Point, Rgb};
use crate::world::figure::{HEAD_RADIUS, Material, Part, Skeleton};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How things are painted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Style {
    /// Flat colours on a light ground
    Plain,
    /// Dark outlines, diagonal white stripes, cream paper
    Ink,
    /// Plain, but every figure wears a tall pink hat
    Hat,
}

/// Colour of heads and hands: a brown that no clothes and no blend of clothes with the ground comes near.
pub const SKIN: Rgb = [166.0, 112.0, 78.0];
/// Colour of shoes.
pub const SHOE: Rgb = [44.0, 42.0, 48.0];
/// Colour of the hat.
pub const HAT: Rgb = [244.0, 92.0, 176.0];
/// Colour of outlines in the ink style.
pub const INK: Rgb = [26.0, 24.0, 40.0];
/// The ground of the ink style.
pub const PAPER: Rgb = [246.0, 232.0, 200.0];

/// Width of an outline, in pixels.
const OUTLINE: f32 = 2.5;

impl Style {
    /// The name, as in the index.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Ink => "ink",
            Self::Hat => "hat",
        }
    }

    /// The parts of a figure, in the order in which they are painted.
    pub fn figure_parts(self, skeleton: &Skeleton) -> Vec<Part> {
        let mut parts = skeleton.parts();
        if self == Self::Hat {
            parts.extend(hat(skeleton.head));
        }
        parts
    }

    /// The ground, where the plain one would be `plain`.
    pub fn ground(self, plain: Rgb) -> Rgb {
        if self == Self::Ink { PAPER } else { plain }
    }

    /// Width of the line around things, in pixels.
    pub fn outline(self) -> f32 {
        if self == Self::Ink { OUTLINE } else { 0.0 }
    }

    /// Paints forms that hang together, in their order, each with its colour.
    pub fn paint(self, canvas: &mut Canvas, forms: &[(&Form, Rgb)]) {
        if self == Self::Ink {
            for (form, _) in forms {
                form.grown(OUTLINE).iter().for_each(|grown| canvas.paint(grown, |_| INK));
            }
        }
        for (form, colour) in forms {
            canvas.paint(form, |point| if self == Self::Ink { striped(*colour, point) } else { *colour });
        }
    }
}

/// Diagonal stripes of 5 pixels in colour and 3 in near-white.
fn striped(colour: Rgb, [x, y]: Point) -> Rgb {
    if ((x + y) / std::f32::consts::SQRT_2).rem_euclid(8.0) < 5.0 { colour } else { [250.0, 246.0, 236.0] }
}

/// A cone with a brim.
fn hat([x, y]: Point) -> [Part; 2] {
    let brow = y - 0.45 * HEAD_RADIUS;
    let cone = Form::Polygon(vec![[x - 7.5, brow], [x, brow - 19.0], [x + 7.5, brow]]);
    let brim = Form::Capsule { from: [x - 9.0, brow], to: [x + 9.0, brow], radius: 2.2 };
    [cone, brim].map(|form| Part { form, material: Material::Hat })
}
