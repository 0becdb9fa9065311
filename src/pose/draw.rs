//! Skeletons and boxes on a picture, so that a person sees what a network sees.

use super::detection::{Detection, Keypoint, PixelBox};
use super::skeleton::{HAND as SIDELESS_HAND, Skeleton};
use image::{Rgb, RgbImage};

/// Colours of persons' skeletons, one after the other.
const PERSONS: [[u8; 3]; 6] =
    [[255, 64, 64], [64, 160, 255], [64, 220, 96], [255, 176, 32], [208, 96, 255], [32, 216, 216]];
const HAND: [u8; 3] = [255, 255, 0];
const LIMB: [u8; 3] = [128, 128, 255];
const PERSON_BOX: [u8; 3] = [255, 255, 255];
/// Peaks that belong to no person.
const STRAY: [u8; 3] = [255, 0, 255];

/// Draws on `image`: boxes thin (persons white, limbs blue, hands yellow), then a skeleton for each person, the
/// brighter the surer, then peaks that belong to nobody as magenta dots.
pub fn draw(image: &mut RgbImage, found: &Detection, skeleton: &Skeleton) {
    let thickness = (image.width().max(image.height()) as f32 / 200.0).max(1.0);
    for area in found.limb_boxes(skeleton) {
        frame(image, area, LIMB, thickness * 0.4);
    }
    for area in found.person_boxes() {
        frame(image, area, PERSON_BOX, thickness * 0.6);
    }
    for area in found.hand_boxes() {
        frame(image, area, HAND, thickness * 0.6);
    }
    for (i, person) in found.persons.iter().enumerate() {
        let colour = PERSONS[i % PERSONS.len()];
        for &(a, b) in skeleton.limbs() {
            if let (Some(a), Some(b)) = (person.keypoints[a], person.keypoints[b]) {
                line(image, a, b, dimmed(colour, a.score.min(b.score)), thickness);
            }
        }
        for k in person.keypoints.iter().flatten() {
            dot(image, k.x, k.y, dimmed(colour, k.score), 1.6 * thickness);
        }
    }
    // Hands that are nobody's in particular have their boxes.
    let told = |kind: &usize| skeleton.keypoints()[*kind] != SIDELESS_HAND;
    for (kind, peaks) in found.peaks.iter().enumerate().filter(|(kind, _)| told(kind)) {
        let owned = |peak: &Keypoint| {
            found.persons.iter().filter_map(|p| p.keypoints[kind]).any(|k| (k.x - peak.x).hypot(k.y - peak.y) < 1.0)
        };
        for peak in peaks.iter().filter(|p| !owned(p)) {
            dot(image, peak.x, peak.y, STRAY, 1.6 * thickness);
        }
    }
    for hand in &found.hands {
        for k in hand.points.iter().flatten() {
            dot(image, k.x, k.y, HAND, 0.8 * thickness);
        }
    }
}

/// A colour, darker for a low confidence.
fn dimmed(colour: [u8; 3], score: f32) -> [u8; 3] {
    colour.map(|c| (f32::from(c) * (0.35 + 0.65 * score.clamp(0.0, 1.0))) as u8)
}

fn set(image: &mut RgbImage, x: i64, y: i64, colour: [u8; 3]) {
    if let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y))
        && let Some(pixel) = image.get_pixel_mut_checked(x, y)
    {
        *pixel = Rgb(colour);
    }
}

/// A disc of this radius.
fn dot(image: &mut RgbImage, x: f32, y: f32, colour: [u8; 3], radius: f32) {
    let reach = radius.ceil() as i64;
    for dy in -reach..=reach {
        for dx in -reach..=reach {
            if (dx as f32).hypot(dy as f32) <= radius {
                set(image, x.round() as i64 + dx, y.round() as i64 + dy, colour);
            }
        }
    }
}

fn line(image: &mut RgbImage, a: Keypoint, b: Keypoint, colour: [u8; 3], thickness: f32) {
    let steps = (b.x - a.x).hypot(b.y - a.y).ceil().max(1.0) as usize;
    for i in 0..=steps {
        let t = i as f32 / steps as f32;
        dot(image, a.x + t * (b.x - a.x), a.y + t * (b.y - a.y), colour, thickness / 2.0);
    }
}

fn frame(image: &mut RgbImage, area: PixelBox, colour: [u8; 3], thickness: f32) {
    let corner = |x, y| Keypoint { x, y, score: 1.0 };
    let [a, b, c, d] =
        [(area.x0, area.y0), (area.x1, area.y0), (area.x1, area.y1), (area.x0, area.y1)].map(|(x, y)| corner(x, y));
    for (from, to) in [(a, b), (b, c), (c, d), (d, a)] {
        line(image, from, to, colour, thickness);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pose::detection::Person;

    #[test]
    fn what_was_found_is_drawn_where_it_was_found() {
        let skeleton = Skeleton::of(&["left_elbow", "left_wrist"]);
        let at = |x, y| Keypoint { x, y, score: 1.0 };
        let mut found = Detection {
            height: 60,
            width: 80,
            persons: vec![Person { score: 1.0, keypoints: vec![Some(at(10.0, 30.0)), Some(at(70.0, 30.0))] }],
            hands: Vec::new(),
            peaks: vec![vec![at(10.0, 30.0)], vec![at(70.0, 30.0), at(40.0, 5.0)]],
            soft_counts: vec![1.0, 2.0],
        };
        found.persons[0].score = 1.0;
        let mut image = RgbImage::new(80, 60);
        draw(&mut image, &found, &skeleton);
        assert_eq!(image.get_pixel(40, 30).0, PERSONS[0], "the limb");
        assert_eq!(image.get_pixel(40, 5).0, STRAY, "a second wrist belongs to nobody");
        assert_eq!(image.get_pixel(40, 55).0, [0; 3]);
    }
}
