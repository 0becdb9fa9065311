//! A stick figure: its joints, and the parts that are painted. It looks at the viewer: its right hand is on the left of
//! the picture.

use crate::rng::Stream;
use crate::world::canvas::{Form, Point};
use crate::world::objects::between;
use crate::world::{Place, Pose, SIDE};
use serde::{Deserialize, Serialize};

/// Radius of a hand, in pixels.
pub const HAND_RADIUS: f32 = 4.5;
/// Radius of the head.
pub const HEAD_RADIUS: f32 = 9.0;
/// Half the width of arms and legs.
pub const LIMB_RADIUS: f32 = 2.8;

/// The joints of a figure, in pixels. Pairs are (right, left), in the figure's own sense.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Skeleton {
    /// Middle of the head.
    pub head: Point,
    /// Between head and shoulders.
    pub neck: Point,
    /// Where the right arm begins.
    pub right_shoulder: Point,
    /// Middle of the right arm.
    pub right_elbow: Point,
    /// Middle of the right hand.
    pub right_hand: Point,
    /// Where the left arm begins.
    pub left_shoulder: Point,
    /// Middle of the left arm.
    pub left_elbow: Point,
    /// Middle of the left hand.
    pub left_hand: Point,
    /// Where the right leg begins.
    pub right_hip: Point,
    /// Middle of the right leg.
    pub right_knee: Point,
    /// Middle of the right foot.
    pub right_foot: Point,
    /// Where the left leg begins.
    pub left_hip: Point,
    /// Middle of the left leg.
    pub left_knee: Point,
    /// Middle of the left foot.
    pub left_foot: Point,
}

/// What a part is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Material {
    /// Torso, arms, legs.
    Clothes,
    /// Head, neck, hands.
    Skin,
    /// Feet.
    Shoe,
    /// The hat of the style that has one.
    Hat,
}

/// One painted part.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its form.
    pub form: Form,
    /// Its material.
    pub material: Material,
}

/// Angles of a limb's two bones, in degrees from hanging down, outwards.
type Bend = [f32; 2];

/// (right arm, left arm, leg) of a pose.
fn bends(pose: Pose) -> [Bend; 3] {
    const DOWN: Bend = [30.0, 16.0];
    const WAVE: Bend = [120.0, 172.0];
    const LEG: Bend = [7.0, 4.0];
    match pose {
        Pose::Standing => [DOWN, DOWN, LEG],
        Pose::ArmsUp => [[146.0, 168.0], [146.0, 168.0], LEG],
        Pose::ArmsOut => [[90.0, 90.0], [90.0, 90.0], LEG],
        Pose::WavingLeft => [DOWN, WAVE, LEG],
        Pose::WavingRight => [WAVE, DOWN, LEG],
        Pose::Walking => [[42.0, 62.0], [42.0, 62.0], [34.0, 26.0]],
    }
}

/// The figures of a scene: one at its place, or two side by side.
pub fn place(count: usize, pose: Pose, place: Place, stream: &mut Stream) -> Vec<Skeleton> {
    let middles: &[f32] = match (count, place) {
        (2, _) => &[34.0, 94.0],
        (_, Place::Left) => &[43.0],
        (_, Place::Right) => &[85.0],
        _ => &[64.0],
    };
    let mut figure = |&x: &f32| {
        let scale = if count == 2 { between(stream, 0.9, 0.98) } else { between(stream, 0.96, 1.04) };
        let at = [x + between(stream, -2.0, 2.0), SIDE as f32 / 2.0 + between(stream, -3.0, 3.0)];
        Skeleton::new(pose, at, scale, |angle| angle + between(stream, -5.0, 5.0))
    };
    middles.iter().map(&mut figure).collect()
}

impl Skeleton {
    /// The names of the joints, in the order of [`Skeleton::joints`].
    pub const NAMES: [&str; 14] = [
        "head",
        "neck",
        "right_shoulder",
        "right_elbow",
        "right_hand",
        "left_shoulder",
        "left_elbow",
        "left_hand",
        "right_hip",
        "right_knee",
        "right_foot",
        "left_hip",
        "left_knee",
        "left_foot",
    ];

    /// A figure around `at`; `bend` makes each angle a little different.
    pub fn new(pose: Pose, at: Point, scale: f32, mut bend: impl FnMut(f32) -> f32) -> Self {
        let [right_arm, left_arm, leg] = bends(pose);
        // -1 for the figure's right, which is on the left of the picture.
        let mut limb = |side: f32, from: Point, angles: Bend, bones: [f32; 2]| {
            let mut joint = from;
            let mut step = |i: usize| {
                let (sin, cos) = bend(angles[i]).to_radians().sin_cos();
                joint = [joint[0] + side * sin * bones[i] * scale, joint[1] + cos * bones[i] * scale];
                joint
            };
            [step(0), step(1)]
        };
        let [x, y] = at;
        let up = |dy: f32| y - dy * scale;
        let shoulder = |side: f32| [x + side * 8.0 * scale, up(20.0)];
        let hip = |side: f32| [x + side * 5.0 * scale, up(-6.0)];
        let (arm, leg_bones) = ([14.5, 14.5], [17.0, 16.0]);
        let [right_elbow, right_hand] = limb(-1.0, shoulder(-1.0), right_arm, arm);
        let [left_elbow, left_hand] = limb(1.0, shoulder(1.0), left_arm, arm);
        let [right_knee, right_foot] = limb(-1.0, hip(-1.0), leg, leg_bones);
        let [left_knee, left_foot] = limb(1.0, hip(1.0), leg, leg_bones);
        Self {
            head: [x, up(34.5)],
            neck: [x, up(23.0)],
            right_shoulder: shoulder(-1.0),
            right_elbow,
            right_hand,
            left_shoulder: shoulder(1.0),
            left_elbow,
            left_hand,
            right_hip: hip(-1.0),
            right_knee,
            right_foot,
            left_hip: hip(1.0),
            left_knee,
            left_foot,
        }
    }

    /// The joints in the order of [`Skeleton::NAMES`].
    pub fn joints(&self) -> [Point; 14] {
        [
            self.head,
            self.neck,
            self.right_shoulder,
            self.right_elbow,
            self.right_hand,
            self.left_shoulder,
            self.left_elbow,
            self.left_hand,
            self.right_hip,
            self.right_knee,
            self.right_foot,
            self.left_hip,
            self.left_knee,
            self.left_foot,
        ]
    }

    /// The parts in the order in which they are painted.
    pub fn parts(&self) -> Vec<Part> {
        let part = |form, material| Part { form, material };
        let bone = |from, to| part(Form::Capsule { from, to, radius: LIMB_RADIUS }, Material::Clothes);
        let corner = |[x, y]: Point, dx: f32, dy: f32| [x + dx, y + dy];
        let torso = vec![
            corner(self.right_shoulder, -1.0, -2.8),
            corner(self.left_shoulder, 1.0, -2.8),
            corner(self.left_hip, 2.5, 2.0),
            corner(self.right_hip, -2.5, 2.0),
        ];
        let foot = |at: Point, side: f32| {
            let toe = corner(at, side * 3.0, 0.0);
            part(Form::Capsule { from: at, to: toe, radius: 3.6 }, Material::Shoe)
        };
        vec![
            part(Form::Capsule { from: self.head, to: self.neck, radius: 2.8 }, Material::Skin),
            bone(self.right_hip, self.right_knee),
            bone(self.right_knee, self.right_foot),
            bone(self.left_hip, self.left_knee),
            bone(self.left_knee, self.left_foot),
            foot(self.right_foot, -1.0),
            foot(self.left_foot, 1.0),
            part(Form::Polygon(torso), Material::Clothes),
            bone(self.right_shoulder, self.right_elbow),
            bone(self.right_elbow, self.right_hand),
            bone(self.left_shoulder, self.left_elbow),
            bone(self.left_elbow, self.left_hand),
            part(Form::disc(self.right_hand, HAND_RADIUS), Material::Skin),
            part(Form::disc(self.left_hand, HAND_RADIUS), Material::Skin),
            part(Form::disc(self.head, HEAD_RADIUS), Material::Skin),
        ]
    }
}
