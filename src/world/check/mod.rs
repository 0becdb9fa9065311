//! Plain image checks: what does a picture show, and is it what was asked for? No network: thresholds, connected
//! components, colours, outlines, lengths.

pub mod figures;
pub mod mask;
pub mod objects;
pub mod report;

use crate::world::{Colour, Place, Pose, Scene, Shape, Style};
use figures::Anatomy;
use image::RgbImage;
use serde::Serialize;

/// What is found in a picture that should show objects or figures. `None` is what cannot be told: nothing there, a form
/// that is none of the known ones, several colours.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Found {
    /// Number of objects or figures.
    pub count: usize,
    /// Their colour.
    pub colour: Option<Colour>,
    /// Where they are.
    pub place: Option<Place>,
    /// The shape of all objects.
    pub shape: Option<Shape>,
    /// The pose of all figures.
    pub pose: Option<Pose>,
    /// What is wrong with the figures' bodies; none for objects.
    pub anatomy: Option<Anatomy>,
}

/// Which attributes are as asked for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// The number.
    pub count: bool,
    /// The colour.
    pub colour: bool,
    /// The position.
    pub place: bool,
    /// The shape of objects, the pose of figures.
    pub form: bool,
    /// What was found.
    pub found: Found,
}

impl Verdict {
    /// Whether every attribute is right.
    pub fn all(&self) -> bool {
        self.count && self.colour && self.place && self.form
    }
}

/// Looks at a picture, in which `asked` should be seen.
pub fn check(image: &RgbImage, asked: Scene) -> Verdict {
    let (found, form) = match asked {
        Scene::Objects { shape, .. } => {
            let found = objects::find(image);
            let form = found.shape == Some(shape);
            (found, form)
        }
        Scene::Figures { pose, .. } => {
            let found = figures::find(image);
            let form = found.pose == Some(pose);
            (found, form)
        }
    };
    Verdict {
        count: found.count == asked.count(),
        colour: found.colour == Some(asked.colour()),
        place: found.place == Some(asked.place()),
        form,
        found,
    }
}

/// How strongly a picture has the look of `style`, from 0 to 1; plain pictures have 0 of every other style.
pub fn style_measure(image: &RgbImage, style: Style) -> f64 {
    match style {
        Style::Plain => 1.0 - style_measure(image, Style::Ink).max(style_measure(image, Style::Hat)),
        Style::Ink => objects::paper(image),
        Style::Hat => figures::hat(image),
    }
}

#[cfg(test)]
mod tests;
