//! Figures in a picture: how many, in which colour and pose, where, and whether their bodies are whole.
//!
//! Heads and hands have a colour of their own, shoes another, all else is clothes. A figure is a head; hands and shoes
//! belong to the nearest one. An arm is the shortest way through clothes from a shoulder to a hand.

use crate::world::canvas::{Point, Rgb, distance_to_line};
use crate::world::check::Found;
use crate::world::check::mask::{Component, Mask, components, distance, ground, grown, neighbours, pixels};
use crate::world::figure::Skeleton;
use crate::world::style::{HAT, SHOE, SKIN};
use crate::world::{Colour, Place, Pose, SIDE};
use image::RgbImage;
use serde::Serialize;
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

/// Smallest area of a hand or a shoe, in pixels. A drawn hand has 64, a drawn shoe 62.
const MIN_PART: usize = 24;
/// Smallest area of a head. A drawn one has 254, under a hat about 150.
const MIN_HEAD: usize = 112;
/// Clothes beside all limbs and the torso: from this area on they are a limb too many.
const MIN_STUMP: usize = 26;
/// From head to shoulder, downwards, and from the middle of the body to a shoulder or a hip, sideways.
const SHOULDER: Point = [8.0, 13.5];
const HIP: Point = [5.0, 39.5];
/// The lengths that an arm and a leg can have, measured along pixels. Drawn arms have 23 to 29, drawn legs 29 to 34.
const ARM_LENGTH: [f32; 2] = [17.0, 36.0];
const LEG_LENGTH: [f32; 2] = [21.0, 42.0];
/// The longer of two arms or legs in parts of the shorter one.
const MAX_RATIO: f32 = 1.33;

/// What can be wrong with a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flaw {
    /// There is no head at all.
    NoHead,
    /// More or fewer than two hands.
    Hands,
    /// A hand that touches no arm.
    LooseHand,
    /// An arm of a length that arms do not have, or two of different lengths.
    ArmLength,
    /// More or fewer than two feet.
    Feet,
    /// A foot that touches no leg.
    LooseFoot,
    /// A leg of a length that legs do not have, or two of different lengths.
    LegLength,
    /// Clothes that do not hang together with the torso.
    LooseLimb,
    /// A limb that ends in nothing.
    ExtraLimb,
}

impl Flaw {
    /// Whether it concerns hands; all others concern limbs.
    pub fn is_of_hands(self) -> bool {
        matches!(self, Self::Hands | Self::LooseHand)
    }
}

/// The state of the figures' bodies.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Anatomy {
    /// Hands in the picture.
    pub hands: usize,
    /// Feet in the picture.
    pub feet: usize,
    /// What is wrong with any figure.
    pub flaws: BTreeSet<Flaw>,
}

impl Anatomy {
    /// Whether there is a hand too many, too few or astray.
    pub fn hand_error(&self) -> bool {
        self.flaws.iter().any(|flaw| flaw.is_of_hands())
    }

    /// Whether anything is wrong with arms, legs, feet or head.
    pub fn limb_error(&self) -> bool {
        self.flaws.iter().any(|flaw| !flaw.is_of_hands())
    }
}

/// What a pixel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Label {
    Ground,
    Skin,
    Shoe,
    Hat,
    Clothes(Colour),
}

impl Label {
    fn rgb(self, ground: Rgb) -> Rgb {
        match self {
            Self::Ground => ground,
            Self::Skin => SKIN,
            Self::Shoe => SHOE,
            Self::Hat => HAT,
            Self::Clothes(colour) => colour.rgb(),
        }
    }
}

/// The parts of all figures.
struct Body {
    heads: Vec<Point>,
    hands: Vec<Component>,
    feet: Vec<Component>,
    clothes: Mask,
}

/// Looks for figures.
pub fn find(image: &RgbImage) -> Found {
    let pixels = pixels(image);
    let (body, colour) = dissect(&pixels);
    let anatomy = examine(&body);
    Found {
        count: body.heads.len(),
        colour,
        place: place(&body.heads),
        shape: None,
        pose: pose(&body),
        anatomy: Some(anatomy),
    }
}

/// Labels every pixel and takes the parts apart. The clothes' colour is the most frequent one; it is none if others are
/// frequent too.
fn dissect(pixels: &[Rgb]) -> (Body, Option<Colour>) {
    let ground = ground(pixels);
    let clothes = Colour::CLOTHES.iter().map(|&colour| Label::Clothes(colour));
    let all: Vec<Label> = [Label::Skin, Label::Shoe, Label::Hat].into_iter().chain(clothes).collect();
    let first: Vec<Label> = pixels.iter().map(|&p| label(p, ground, &all)).collect();
    let area = |colour: &Colour| first.iter().filter(|&&l| l == Label::Clothes(*colour)).count();
    let main = *Colour::CLOTHES.iter().max_by_key(|c| area(c)).expect("there are colours");
    let total: usize = Colour::CLOTHES.iter().map(area).sum();
    let colour = (total > MIN_HEAD && area(&main) * 4 > total * 3).then_some(main);

    // With one colour of clothes fewer blends are taken for something else.
    let known = [Label::Skin, Label::Shoe, Label::Hat, Label::Clothes(main)];
    let labels: Vec<Label> = pixels.iter().map(|&p| label(p, ground, &known)).collect();
    let of = |wanted: Label| labels.iter().map(|&l| l == wanted).collect::<Mask>();
    let (heads, hands): (Vec<_>, Vec<_>) =
        components(&of(Label::Skin)).into_iter().filter(|c| c.area() >= MIN_PART).partition(|c| c.area() >= MIN_HEAD);
    let feet = components(&of(Label::Shoe)).into_iter().filter(|c| c.area() >= MIN_PART).collect();
    let mut heads: Vec<Point> = heads.iter().map(Component::centre).collect();
    heads.sort_by(|a, b| a[0].total_cmp(&b[0]));
    (Body { heads, hands, feet, clothes: of(Label::Clothes(main)) }, colour)
}

/// The material that the pixel, a blend of it with the ground, is nearest to. What is mostly ground is ground.
fn label(pixel: Rgb, ground: Rgb, known: &[Label]) -> Label {
    let offset = [0, 1, 2].map(|c| pixel[c] - ground[c]);
    if distance(pixel, ground) < 40.0 {
        return Label::Ground;
    }
    let fit = |&label: &Label| {
        let full = label.rgb(ground);
        let full = [0, 1, 2].map(|c| full[c] - ground[c]);
        let dot = |a: Rgb, b: Rgb| a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
        let share = (dot(offset, full) / dot(full, full)).clamp(0.0, 1.1);
        (label, share, distance(offset, full.map(|v| share * v)))
    };
    let best = known.iter().map(fit).min_by(|a, b| a.2.total_cmp(&b.2));
    let (label, share, _) = best.expect("there are materials");
    if share < 0.45 { Label::Ground } else { label }
}

/// The place of a single figure; for two, the centre if they are at both sides of the middle.
fn place(heads: &[Point]) -> Option<Place> {
    match heads {
        [head] => {
            let gap = |x: f32| (head[0] - x).abs();
            let places = [(Place::Left, 43.0), (Place::Centre, 64.0), (Place::Right, 85.0)];
            places.into_iter().min_by(|a, b| gap(a.1).total_cmp(&gap(b.1))).map(|(place, _)| place)
        }
        [left, right] => (left[0] < 54.0 && right[0] > 74.0).then_some(Place::Centre),
        _ => None,
    }
}

/// The components that are nearest to each head, by the middle of the figure below it.
fn share_out<'a>(heads: &[Point], parts: &'a [Component]) -> Vec<Vec<&'a Component>> {
    let mut shares = vec![Vec::new(); heads.len()];
    for part in parts {
        let [x, _] = part.centre();
        let nearest = (0..heads.len()).min_by(|&a, &b| (heads[a][0] - x).abs().total_cmp(&(heads[b][0] - x).abs()));
        if let Some(nearest) = nearest {
            shares[nearest].push(part);
        }
    }
    for share in &mut shares {
        share.sort_by(|a, b| a.centre()[0].total_cmp(&b.centre()[0]));
    }
    shares
}

/// The pose that all figures have: that whose hands and feet are nearest, seen from the head.
fn pose(body: &Body) -> Option<Pose> {
    let hands = share_out(&body.heads, &body.hands);
    let feet = share_out(&body.heads, &body.feet);
    let mut poses = Vec::new();
    for (i, head) in body.heads.iter().enumerate() {
        let ([right_hand, left_hand], [right_foot, left_foot]) = (hands[i].as_slice(), feet[i].as_slice()) else {
            return None;
        };
        let found = [right_hand, left_hand, right_foot, left_foot].map(|part| {
            let [x, y] = part.centre();
            [x - head[0], y - head[1]]
        });
        let misfit = |pose: &Pose| {
            let known = Skeleton::new(*pose, [0.0; 2], 1.0, |angle| angle);
            let ends = [known.right_hand, known.left_hand, known.right_foot, known.left_foot];
            let gap = |k: usize| {
                let [x, y] = [ends[k][0] - known.head[0], ends[k][1] - known.head[1]];
                (found[k][0] - x).hypot(found[k][1] - y)
            };
            (0..4).map(gap).sum::<f32>() / 4.0
        };
        let (pose, misfit) = Pose::ALL
            .iter()
            .map(|pose| (*pose, misfit(pose)))
            .min_by(|a, b| a.1.total_cmp(&b.1))
            .expect("there are poses");
        if misfit > 10.0 {
            return None;
        }
        poses.push(pose);
    }
    let first = *poses.first()?;
    poses.iter().all(|&pose| pose == first).then_some(first)
}

/// Looks for everything that is wrong.
fn examine(body: &Body) -> Anatomy {
    let mut anatomy = Anatomy { hands: body.hands.len(), feet: body.feet.len(), ..Anatomy::default() };
    let flaws = &mut anatomy.flaws;
    if body.heads.is_empty() {
        flaws.insert(Flaw::NoHead);
        return anatomy;
    }
    let pieces: Vec<Component> = components(&body.clothes).into_iter().filter(|c| c.area() >= MIN_PART).collect();
    let torsos: Vec<&Component> = pieces.iter().take(body.heads.len()).collect();
    if pieces.len() > body.heads.len() {
        flaws.insert(Flaw::LooseLimb);
    }
    // Where limbs are.
    let mut lines: Mask = vec![false; SIDE * SIDE];
    let hands = share_out(&body.heads, &body.hands);
    let feet = share_out(&body.heads, &body.feet);
    for (i, head) in body.heads.iter().enumerate() {
        let mut limbs = |ends: &[&Component], root: Point, range: [f32; 2], [number, loose, length]: [Flaw; 3]| {
            if ends.len() != 2 {
                flaws.insert(number);
            }
            let mut lengths = Vec::new();
            for end in ends {
                let near = grown(&end.mask(), 2);
                if !torsos.iter().any(|torso| torso.pixels.iter().any(|&p| near[p])) {
                    flaws.insert(loose);
                    continue;
                }
                // The nearer of the two roots is where this limb begins.
                let side = if end.centre()[0] < head[0] { -1.0 } else { 1.0 };
                let start = [head[0] + side * root[0], head[1] + root[1]];
                match way(&body.clothes, start, &near) {
                    Some((found, path)) => {
                        // To the middle of the hand or foot.
                        lengths.push(found + 4.0);
                        path.into_iter().for_each(|p| lines[p] = true);
                    }
                    None => {
                        flaws.insert(loose);
                    }
                }
            }
            let outside = lengths.iter().any(|l| !(range[0]..=range[1]).contains(l));
            let uneven = matches!(lengths.as_slice(), [a, b] if a.max(*b) > MAX_RATIO * a.min(*b));
            if outside || uneven {
                flaws.insert(length);
            }
        };
        limbs(&hands[i], SHOULDER, ARM_LENGTH, [Flaw::Hands, Flaw::LooseHand, Flaw::ArmLength]);
        limbs(&feet[i], HIP, LEG_LENGTH, [Flaw::Feet, Flaw::LooseFoot, Flaw::LegLength]);
    }
    let stumps: Mask = {
        let near_limbs = grown(&lines, 7);
        let in_torso = |p: usize| {
            let at = [(p % SIDE) as f32 + 0.5, (p / SIDE) as f32 + 0.5];
            body.heads.iter().any(|[x, y]| distance_to_line(at, [*x, y + SHOULDER[1]], [*x, y + HIP[1]]) < 14.0)
        };
        (0..SIDE * SIDE).map(|p| body.clothes[p] && !near_limbs[p] && !in_torso(p)).collect()
    };
    if components(&stumps).first().is_some_and(|stump| stump.area() >= MIN_STUMP) {
        flaws.insert(Flaw::ExtraLimb);
    }
    anatomy
}

/// The length in pixels of the shortest way through `clothes` from near `start` to a pixel in `goal`, and the way.
fn way(clothes: &Mask, start: Point, goal: &Mask) -> Option<(f32, Vec<usize>)> {
    let mut cost = vec![u32::MAX; SIDE * SIDE];
    let mut from = vec![usize::MAX; SIDE * SIDE];
    let mut queue = BinaryHeap::new();
    for p in (0..SIDE * SIDE).filter(|&p| clothes[p]) {
        let gap = ((p % SIDE) as f32 + 0.5 - start[0]).hypot((p / SIDE) as f32 + 0.5 - start[1]);
        if gap < 6.0 {
            cost[p] = (gap * 10.0) as u32;
            queue.push(Reverse((cost[p], p)));
        }
    }
    while let Some(Reverse((so_far, p))) = queue.pop() {
        if so_far > cost[p] {
            continue;
        }
        if goal[p] {
            let mut path = vec![p];
            while from[path[path.len() - 1]] != usize::MAX {
                path.push(from[path[path.len() - 1]]);
            }
            return Some((so_far as f32 / 10.0, path));
        }
        for q in neighbours(p).filter(|&q| clothes[q]) {
            let straight = p % SIDE == q % SIDE || p / SIDE == q / SIDE;
            let next = so_far + if straight { 10 } else { 14 };
            if next < cost[q] {
                cost[q] = next;
                from[q] = p;
                queue.push(Reverse((next, q)));
            }
        }
    }
    None
}

/// How much of a hat there is above the heads: 1 for half a hat's area or more on each, 0 for none.
pub fn hat(image: &RgbImage) -> f64 {
    let pixels = pixels(image);
    let ground = ground(&pixels);
    let clothes = Colour::CLOTHES.iter().map(|&colour| Label::Clothes(colour));
    let known: Vec<Label> = [Label::Skin, Label::Shoe, Label::Hat].into_iter().chain(clothes).collect();
    let hat: Mask = pixels.iter().map(|&p| label(p, ground, &known) == Label::Hat).collect();
    let area: usize = components(&hat).iter().map(Component::area).filter(|&area| area >= MIN_PART).sum();
    let heads = dissect(&pixels).0.heads.len().max(1);
    (area as f64 / (80.0 * heads as f64)).min(1.0)
}
