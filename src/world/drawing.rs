//! A scene with everything in its place, ready to be painted.

use crate::rng::{Purpose, Stream};
use crate::world::canvas::{Canvas, Form, Rgb};
use crate::world::figure::{self, Material, Part, Skeleton};
use crate::world::objects::{self, Object, between};
use crate::world::style::{HAT, SHOE, SKIN};
use crate::world::{Colour, Scene, Style};
use image::RgbImage;

/// What is painted where.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawing {
    /// The attributes.
    pub scene: Scene,
    /// How it is painted.
    pub style: Style,
    /// Colour of the ground.
    pub ground: Rgb,
    /// The objects, if the scene has these.
    pub objects: Vec<Object>,
    /// The figures, if the scene has these.
    pub figures: Vec<Skeleton>,
}

impl Drawing {
    /// Picture `item` of `seed`, showing `scene`. The same scene, seed and item are the same drawing in every style.
    pub fn new(scene: Scene, style: Style, seed: u64, item: u64) -> Self {
        let mut stream = Stream::new(seed, 3, item, Purpose::World);
        // Light, with a hint of any tint.
        let light = between(&mut stream, 232.0, 246.0);
        let plain = [0; 3].map(|_| light + between(&mut stream, -6.0, 6.0));
        let (mut objects, mut figures) = (Vec::new(), Vec::new());
        match scene {
            Scene::Objects { count, shape, place, .. } => {
                objects = objects::place(count, shape, place, &mut stream);
            }
            Scene::Figures { count, pose, place, .. } => figures = figure::place(count, pose, place, &mut stream),
        }
        Self { scene, style, ground: style.ground(plain), objects, figures }
    }

    /// The pixels.
    pub fn render(&self) -> RgbImage {
        let groups = self.figures.iter().map(|skeleton| self.style.figure_parts(skeleton)).collect::<Vec<_>>();
        self.render_parts(&groups)
    }

    /// The pixels, with figures made of these parts instead of their own.
    pub fn render_parts(&self, figures: &[Vec<Part>]) -> RgbImage {
        let mut canvas = Canvas::new(self.ground);
        for object in &self.objects {
            // Smaller by the outline, so that neighbours do not touch.
            let object = Object { size: object.size - self.style.outline() * 2.0, ..*object };
            self.style.paint(&mut canvas, &[(&object.form(), self.scene.colour().rgb())]);
        }
        for parts in figures {
            let forms: Vec<(&Form, Rgb)> =
                parts.iter().map(|part| (&part.form, paint_of(part.material, self.scene.colour()))).collect();
            self.style.paint(&mut canvas, &forms);
        }
        canvas.finish()
    }
}

fn paint_of(material: Material, clothes: Colour) -> Rgb {
    match material {
        Material::Clothes => clothes.rgb(),
        Material::Skin => SKIN,
        Material::Shoe => SHOE,
        Material::Hat => HAT,
    }
}
