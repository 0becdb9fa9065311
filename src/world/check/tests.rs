//! The checks tell right pictures from wrong ones, also through a little blur and noise.

use super::*;
use crate::rng::{Purpose, Stream};
use crate::world::SIDE;
use crate::world::canvas::Form;
use crate::world::check::figures::Flaw;
use crate::world::figure::{HAND_RADIUS, LIMB_RADIUS, Material, Part};
use crate::world::split::Pool;
use crate::world::{Drawing, Kind, Split};

/// What a picture is like after a small autoencoder: blurred by a kernel of 1/4, 1/2, 1/4 in both directions, with
/// noise of 6 levels.
fn worn(image: &RgbImage, seed: u64) -> RgbImage {
    let mut stream = Stream::new(seed, 0, 0, Purpose::Bench);
    let at = |x: i64, y: i64| image.get_pixel(x.clamp(0, 127) as u32, y.clamp(0, 127) as u32).0.map(f32::from);
    RgbImage::from_fn(SIDE as u32, SIDE as u32, |x, y| {
        let mut sum = [0f32; 3];
        for (dx, wx) in [(-1, 0.25), (0, 0.5), (1, 0.25)] {
            for (dy, wy) in [(-1, 0.25), (0, 0.5), (1, 0.25)] {
                let p = at(i64::from(x) + dx, i64::from(y) + dy);
                (0..3).for_each(|c| sum[c] += wx * wy * p[c]);
            }
        }
        image::Rgb(sum.map(|v| (v + 6.0 * stream.normal() as f32).round().clamp(0.0, 255.0) as u8))
    })
}

/// How many of the pictures are wholly right, and what is wrong with the others.
fn wrong(kind: Kind, style: Style, count: u64, wear: bool) -> Vec<String> {
    let pool = Pool::new(Split::Train, kind);
    let mut wrong = Vec::new();
    for item in 0..count {
        let scene = pool.draw(5, item);
        let mut image = Drawing::new(scene, style, 5, item).render();
        if wear {
            image = worn(&image, item);
        }
        let verdict = check(&image, scene);
        let whole = verdict.found.anatomy.as_ref().is_none_or(|a| !a.hand_error() && !a.limb_error());
        if !verdict.all() || !whole {
            wrong.push(format!("{item} {scene:?}: {:?}", verdict.found));
        }
    }
    wrong
}

#[test]
fn drawn_pictures_pass() {
    for (kind, style, count) in [
        (Kind::Objects, Style::Plain, 300),
        (Kind::Figures, Style::Plain, 150),
        (Kind::Objects, Style::Ink, 60),
        (Kind::Figures, Style::Hat, 60),
    ] {
        for wear in [false, true] {
            let wrong = wrong(kind, style, count, wear);
            assert!(wrong.len() as u64 * 100 <= count, "{kind:?} {style:?} {wear}\n{}", wrong.join("\n"));
        }
    }
}

#[test]
fn a_wrong_attribute_is_seen() {
    let pool = Pool::new(Split::Train, Kind::All);
    let mut seen = 0;
    for item in 0..60 {
        let scene = pool.draw(6, item);
        let asked = pool.draw(7, item);
        let (Scene::Objects { .. }, Scene::Objects { .. }) = (scene, asked) else { continue };
        let verdict = check(&worn(&Drawing::new(scene, Style::Plain, 6, item).render(), item), asked);
        let Scene::Objects { count, colour, shape, place } = scene else { continue };
        let Scene::Objects { count: c, colour: k, shape: s, place: p } = asked else { continue };
        assert_eq!(
            [verdict.count, verdict.colour, verdict.form, verdict.place],
            [count == c, colour == k, shape == s, place == p],
            "{scene:?} {asked:?}"
        );
        seen += 1;
    }
    assert!(seen > 10);
    // Objects are no figure, figures are no objects of a known shape, an empty picture is nothing.
    let circle = Scene::Objects { count: 1, colour: Colour::Red, shape: Shape::Circle, place: Place::Left };
    let figure = Scene::Figures { count: 1, colour: Colour::Red, pose: Pose::Walking, place: Place::Left };
    let draw = |scene| Drawing::new(scene, Style::Plain, 1, 1).render();
    let verdict = check(&draw(circle), figure);
    assert!(!verdict.count && !verdict.form && !verdict.place);
    assert!(!check(&draw(figure), circle).form);
    let empty = RgbImage::from_pixel(SIDE as u32, SIDE as u32, image::Rgb([240; 3]));
    for asked in [circle, figure] {
        let verdict = check(&empty, asked);
        assert!(!verdict.count && !verdict.form && !verdict.place && !verdict.colour);
    }
}

/// The flaws of a standing figure whose parts were changed.
fn flaws(pose: Pose, change: impl Fn(&Drawing, &mut Vec<Part>)) -> Vec<Flaw> {
    let scene = Scene::Figures { count: 1, colour: Colour::Blue, pose, place: Place::Centre };
    let mut all = Vec::new();
    for item in 0..8 {
        let drawing = Drawing::new(scene, Style::Plain, 2, item);
        let mut parts = Style::Plain.figure_parts(&drawing.figures[0]);
        change(&drawing, &mut parts);
        let image = worn(&drawing.render_parts(&[parts]), item);
        let found = check(&image, scene).found.anatomy.unwrap();
        all.push(found.flaws.into_iter().collect::<Vec<_>>());
    }
    assert!(all.iter().all(|flaws| *flaws == all[0]), "{all:?}");
    all.swap_remove(0)
}

fn part(form: Form, material: Material) -> Part {
    Part { form, material }
}

#[test]
fn hands_and_limbs_that_are_wrong_are_seen() {
    assert_eq!(flaws(Pose::Standing, |_, _| ()), []);
    // No left hand: parts 12 and 13 are the hands.
    assert_eq!(flaws(Pose::ArmsOut, |_, parts| drop(parts.remove(13))), [Flaw::Hands, Flaw::ExtraLimb]);
    // A third hand at an elbow's side.
    let third = |drawing: &Drawing, parts: &mut Vec<Part>| {
        let [x, y] = drawing.figures[0].left_elbow;
        parts.push(part(Form::disc([x, y - 6.0], HAND_RADIUS), Material::Skin));
    };
    assert!(flaws(Pose::ArmsOut, third).contains(&Flaw::Hands));
    // A third arm with a hand.
    let arm = |drawing: &Drawing, parts: &mut Vec<Part>| {
        let from = drawing.figures[0].left_shoulder;
        let to = [from[0] + 20.0, from[1] - 22.0];
        parts.push(part(Form::Capsule { from, to, radius: LIMB_RADIUS }, Material::Clothes));
        parts.push(part(Form::disc(to, HAND_RADIUS), Material::Skin));
    };
    assert!(flaws(Pose::ArmsOut, arm).contains(&Flaw::Hands));
    // The same without a hand.
    let stump = |drawing: &Drawing, parts: &mut Vec<Part>| {
        let from = drawing.figures[0].left_shoulder;
        let to = [from[0] + 16.0, from[1] - 22.0];
        parts.insert(0, part(Form::Capsule { from, to, radius: LIMB_RADIUS }, Material::Clothes));
    };
    assert_eq!(flaws(Pose::ArmsOut, stump), [Flaw::ExtraLimb]);
    // A forearm is missing: the hand floats. Part 11 is the left forearm.
    assert_eq!(flaws(Pose::ArmsUp, |_, parts| drop(parts.remove(11))), [Flaw::LooseHand, Flaw::ExtraLimb]);
    // A foot is missing: parts 5 and 6 are the feet.
    assert!(flaws(Pose::Standing, |_, parts| drop(parts.remove(5))).contains(&Flaw::Feet));
    // A leg is missing but not its foot.
    let legless = |_: &Drawing, parts: &mut Vec<Part>| drop(parts.drain(1..3));
    assert!(flaws(Pose::Walking, legless).contains(&Flaw::LooseFoot));
    // An arm of twice the length.
    let long = |drawing: &Drawing, parts: &mut Vec<Part>| {
        let [x, y] = drawing.figures[0].left_hand;
        let [ex, ey] = drawing.figures[0].left_elbow;
        let to = [ex + 2.0 * (x - ex), ey + 2.0 * (y - ey)];
        parts[11] = part(Form::Capsule { from: [ex, ey], to, radius: LIMB_RADIUS }, Material::Clothes);
        parts[13] = part(Form::disc(to, HAND_RADIUS), Material::Skin);
    };
    assert_eq!(flaws(Pose::WavingLeft, long), [Flaw::ArmLength]);
    // No head.
    assert!(flaws(Pose::Standing, |_, parts| drop(parts.remove(14))).contains(&Flaw::NoHead));
}

#[test]
fn styles_are_measured() {
    let pool = Pool::new(Split::Train, Kind::All);
    for item in 0..24 {
        let scene = pool.draw(9, item);
        let seen = |style| {
            let image = worn(&Drawing::new(scene, style, 9, item).render(), item);
            [Style::Plain, Style::Ink, Style::Hat].map(|of| style_measure(&image, of))
        };
        let plain = seen(Style::Plain);
        assert!(plain[0] > 0.95 && plain[1] < 0.05 && plain[2] < 0.05, "{scene:?} {plain:?}");
        assert!(seen(Style::Ink)[1] > 0.9, "{scene:?} {:?}", seen(Style::Ink));
        if scene.is_figures() {
            assert!(seen(Style::Hat)[2] > 0.9, "{scene:?} {:?}", seen(Style::Hat));
        }
    }
}
