//! Objects in a picture: how many, of which colour and shape, where.

use crate::world::canvas::{Canvas, Rgb};
use crate::world::check::Found;
use crate::world::check::mask::{Component, components, distance, ground, hsv, pixels};
use crate::world::objects::Object;
use crate::world::style::PAPER;
use crate::world::{Colour, Place, SIDE, Shape};
use image::RgbImage;
use std::f32::consts::{PI, TAU};
use std::sync::LazyLock;

/// Smallest area of an object, in pixels. The smallest star has about 200.
const MIN_AREA: usize = 70;

/// Rays of an outline.
const RAYS: usize = 72;

/// Rays by which an outline may be turned: 10 degrees each way.
const TURN: isize = 2;

/// An outline further than this from every shape's is none of them.
const MAX_MISFIT: f32 = 0.13;

/// Looks for objects.
pub fn find(image: &RgbImage) -> Found {
    let pixels = pixels(image);
    let objects = separate(&pixels);
    Found {
        count: objects.len(),
        colour: common(objects.iter().map(|object| colour(object, &pixels))),
        place: place(&objects),
        shape: common(objects.iter().map(shape)),
        pose: None,
        anatomy: None,
    }
}

/// What differs from the ground, in pieces. The border is drawn at less than half of the full contrast, so that blur
/// moves it little.
fn separate(pixels: &[Rgb]) -> Vec<Component> {
    let ground = ground(pixels);
    let contrast: Vec<f32> = pixels.iter().map(|&p| distance(p, ground)).collect();
    let mut strong: Vec<f32> = contrast.iter().copied().filter(|&c| c > 40.0).collect();
    if strong.len() < MIN_AREA {
        return Vec::new();
    }
    strong.sort_by(f32::total_cmp);
    let threshold = (0.42 * strong[strong.len() * 3 / 4]).max(40.0);
    let mask: Vec<bool> = contrast.iter().map(|&c| c > threshold).collect();
    components(&mask).into_iter().filter(|c| c.area() >= MIN_AREA).collect()
}

/// The value that all have, if there is one.
fn common<T: PartialEq>(mut values: impl Iterator<Item = Option<T>>) -> Option<T> {
    let first = values.next()??;
    values.all(|value| value.as_ref() == Some(&first)).then_some(first)
}

/// The colour by the mean hue of what has a hue; black if little has.
fn colour(object: &Component, pixels: &[Rgb]) -> Option<Colour> {
    let mean = |of: &[Rgb]| [0, 1, 2].map(|c| of.iter().map(|p| p[c]).sum::<f32>() / of.len() as f32);
    let all: Vec<Rgb> = object.pixels.iter().map(|&i| pixels[i]).collect();
    let coloured: Vec<Rgb> = all.iter().copied().filter(|&p| hsv(p)[1] > 0.4 && hsv(p)[2] > 0.25).collect();
    if coloured.len() * 4 > all.len() {
        return Some(nearest_hue(hsv(mean(&coloured))[0]));
    }
    (hsv(mean(&all))[2] < 0.5).then_some(Colour::Black)
}

/// The colour of the world whose hue is nearest.
pub fn nearest_hue(hue: f32) -> Colour {
    let gap = |colour: &Colour| {
        let gap = (hsv(colour.rgb())[0] - hue).rem_euclid(360.0);
        gap.min(360.0 - gap)
    };
    let nearest = Colour::CLOTHES.iter().min_by(|a, b| gap(a).total_cmp(&gap(b)));
    *nearest.expect("there are colours")
}

/// The place whose middle is nearest to that of the group.
fn place(objects: &[Component]) -> Option<Place> {
    if objects.is_empty() {
        return None;
    }
    let centres: Vec<_> = objects.iter().map(Component::centre).collect();
    let middle = [0, 1].map(|axis| {
        let values = || centres.iter().map(|c| c[axis]);
        (values().fold(f32::INFINITY, f32::min) + values().fold(0.0, f32::max)) / 2.0 / SIDE as f32
    });
    let gap = |place: &Place| (place.middle()[0] - middle[0]).hypot(place.middle()[1] - middle[1]);
    Place::ALL.iter().copied().min_by(|a, b| gap(a).total_cmp(&gap(b)))
}

/// The shape whose outline fits best, if any fits.
fn shape(object: &Component) -> Option<Shape> {
    static OUTLINES: LazyLock<Vec<(Shape, [f32; RAYS])>> = LazyLock::new(|| {
        let drawn = |&shape: &Shape| {
            let mut canvas = Canvas::new([255.0; 3]);
            let object = Object { shape, at: [64.0, 64.0], size: 27.0, tilt: 0.0 };
            canvas.paint(&object.form(), |_| [0.0; 3]);
            let mask: Vec<bool> = canvas.finish().pixels().map(|p| p.0[0] < 128).collect();
            (shape, outline(&components(&mask)[0]))
        };
        Shape::ALL.iter().map(drawn).collect()
    });
    let found = outline(object);
    let misfit = |known: &[f32; RAYS]| {
        let at = |turn: isize| {
            let square = |ray: usize| {
                let turned = (ray as isize + turn).rem_euclid(RAYS as isize) as usize;
                (found[turned] - known[ray]).powi(2)
            };
            ((0..RAYS).map(square).sum::<f32>() / RAYS as f32).sqrt()
        };
        (-TURN..=TURN).map(at).fold(f32::INFINITY, f32::min)
    };
    let fits = OUTLINES.iter().map(|(shape, known)| (*shape, misfit(known)));
    let (shape, misfit) = fits.min_by(|a, b| a.1.total_cmp(&b.1)).expect("there are shapes");
    (misfit <= MAX_MISFIT).then_some(shape)
}

/// How far the outline is from the middle in each direction, in units of the radius of a disc of the same area. Holes
/// are filled.
fn outline(object: &Component) -> [f32; RAYS] {
    let filled = object.filled();
    let all: Vec<usize> = (0..filled.len()).filter(|&i| filled[i]).collect();
    let whole = Component { pixels: all };
    let [cx, cy] = whole.centre();
    let radius = (whole.area() as f32 / PI).sqrt();
    // Between pixel middles the mask is interpolated.
    let inside = |x: f32, y: f32| -> f32 {
        let (x, y) = (x - 0.5, y - 0.5);
        let (left, top) = (x.floor(), y.floor());
        let at = |x: f32, y: f32| {
            let range = 0.0..SIDE as f32;
            f32::from(u8::from(range.contains(&x) && range.contains(&y) && filled[y as usize * SIDE + x as usize]))
        };
        let (fx, fy) = (x - left, y - top);
        let row = |y: f32| at(left, y) * (1.0 - fx) + at(left + 1.0, y) * fx;
        row(top) * (1.0 - fy) + row(top + 1.0) * fy
    };
    std::array::from_fn(|ray| {
        let (sin, cos) = (TAU * ray as f32 / RAYS as f32).sin_cos();
        let steps = (0..4 * SIDE).map(|step| step as f32 / 4.0);
        let edge = steps.skip(4).find(|&r| inside(cx + r * sin, cy - r * cos) < 0.5);
        edge.unwrap_or(SIDE as f32) / radius
    })
}

/// How near the ground is to the ink style's paper: 1 on it, 0 at the distance of a plain ground or further.
pub fn paper(image: &RgbImage) -> f64 {
    let found = ground(&pixels(image));
    let grey = |[r, g, b]: Rgb| r - (g + 2.0 * b) / 3.0;
    // Plain grounds have all channels within 12 of each other.
    f64::from(((grey(found) - 12.0) / (grey(PAPER) - 12.0)).clamp(0.0, 1.0))
}
