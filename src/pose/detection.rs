//! What was found in a picture: persons with their keypoints, hands, boxes, counts.

use super::skeleton::Skeleton;
use serde::Serialize;

/// A keypoint in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Keypoint {
    /// Column.
    pub x: f32,
    /// Row.
    pub y: f32,
    /// Confidence, about 0 to 1.
    pub score: f32,
}

impl Keypoint {
    fn distance(&self, other: &Self) -> f32 {
        (self.x - other.x).hypot(self.y - other.y)
    }
}

/// A rectangle in pixels; it may reach beyond the picture until [`clipped`](PixelBox::clipped).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PixelBox {
    /// Left edge.
    pub x0: f32,
    /// Upper edge.
    pub y0: f32,
    /// Right edge.
    pub x1: f32,
    /// Lower edge.
    pub y1: f32,
}

impl PixelBox {
    /// The square of this side around a point.
    pub fn square(x: f32, y: f32, side: f32) -> Self {
        Self { x0: x - side / 2.0, y0: y - side / 2.0, x1: x + side / 2.0, y1: y + side / 2.0 }
    }

    /// The smallest box around points, widened by `margin` pixels on each side. `None` without points.
    pub fn around<'a>(points: impl IntoIterator<Item = &'a Keypoint>, margin: f32) -> Option<Self> {
        let grow = |b: Option<Self>, p: &Keypoint| {
            let b = b.unwrap_or(Self { x0: p.x, y0: p.y, x1: p.x, y1: p.y });
            Some(Self { x0: b.x0.min(p.x), y0: b.y0.min(p.y), x1: b.x1.max(p.x), y1: b.y1.max(p.y) })
        };
        let b = points.into_iter().fold(None, grow)?;
        Some(Self { x0: b.x0 - margin, y0: b.y0 - margin, x1: b.x1 + margin, y1: b.y1 + margin })
    }

    /// The part inside a picture; `None` if there is none.
    pub fn clipped(&self, height: usize, width: usize) -> Option<Self> {
        let (w, h) = (width as f32, height as f32);
        let b = Self {
            x0: self.x0.clamp(0.0, w),
            y0: self.y0.clamp(0.0, h),
            x1: self.x1.clamp(0.0, w),
            y1: self.y1.clamp(0.0, h),
        };
        (b.x1 > b.x0 && b.y1 > b.y0).then_some(b)
    }

    /// The share of both boxes' union that they have in common.
    pub fn overlap(&self, other: &Self) -> f32 {
        let w = self.x1.min(other.x1) - self.x0.max(other.x0);
        let h = self.y1.min(other.y1) - self.y0.max(other.y0);
        let common = w.max(0.0) * h.max(0.0);
        let union = self.width() * self.height() + other.width() * other.height() - common;
        if union > 0.0 { common / union } else { 0.0 }
    }

    /// Width.
    pub fn width(&self) -> f32 {
        self.x1 - self.x0
    }

    /// Height.
    pub fn height(&self) -> f32 {
        self.y1 - self.y0
    }
}

/// One person.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Person {
    /// How sure the network is of the person as a whole.
    pub score: f32,
    /// By keypoint of the skeleton; `None` where it was not found.
    pub keypoints: Vec<Option<Keypoint>>,
}

/// One hand.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hand {
    /// `left` or `right`, as the person sees it; empty if the network does not say.
    pub side: &'static str,
    /// How sure a hand network is of it, else the confidence of the keypoint it was found by.
    pub score: f32,
    /// Where it is.
    #[serde(rename = "box")]
    pub area: PixelBox,
    /// 21 points of a hand network; empty without one.
    pub points: Vec<Option<Keypoint>>,
}

/// Everything that was found in one picture. Coordinates in pixels of the picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Detection {
    /// Rows of the picture.
    pub height: usize,
    /// Columns of the picture.
    pub width: usize,
    /// Persons, surest first.
    pub persons: Vec<Person>,
    /// Hands, of persons or alone.
    pub hands: Vec<Hand>,
    /// All peaks of each keypoint's map, whether they belong to a person or not: a third hand is here.
    pub peaks: Vec<Vec<Keypoint>>,
    /// Sum of each keypoint's map. Grows with the number of copies and with their size: compare pictures of the same
    /// size and scene only.
    pub soft_counts: Vec<f64>,
}

/// Keypoints below this confidence make no boxes.
const SURE: f32 = 0.3;

impl Detection {
    /// Moves everything to a picture of another size.
    pub fn rescale(&mut self, height: usize, width: usize) {
        let (sy, sx) = (height as f32 / self.height as f32, width as f32 / self.width as f32);
        let point = |p: &mut Keypoint| {
            p.x *= sx;
            p.y *= sy;
        };
        self.persons.iter_mut().flat_map(|p| p.keypoints.iter_mut().flatten()).for_each(point);
        self.peaks.iter_mut().flatten().for_each(point);
        for hand in &mut self.hands {
            let a = &mut hand.area;
            (a.x0, a.x1, a.y0, a.y1) = (a.x0 * sx, a.x1 * sx, a.y0 * sy, a.y1 * sy);
            hand.points.iter_mut().flatten().for_each(point);
        }
        (self.height, self.width) = (height, width);
    }

    /// A box around each person.
    pub fn person_boxes(&self) -> Vec<PixelBox> {
        let one = |person: &Person| {
            let sure: Vec<&Keypoint> = person.keypoints.iter().flatten().filter(|k| k.score >= SURE).collect();
            let tight = PixelBox::around(sure.iter().copied(), 0.0)?;
            // Keypoints end at ears, wrists and ankles; the person goes on.
            let margin = 0.12 * tight.width().max(tight.height());
            PixelBox::around(sure, margin)?.clipped(self.height, self.width)
        };
        self.persons.iter().filter_map(one).collect()
    }

    /// A box around each part of an arm or a leg whose two ends were found.
    pub fn limb_boxes(&self, skeleton: &Skeleton) -> Vec<PixelBox> {
        let mut boxes = Vec::new();
        for person in &self.persons {
            for (a, b) in skeleton.arms_and_legs() {
                if let (Some(a), Some(b)) = (person.keypoints[a], person.keypoints[b])
                    && a.score.min(b.score) >= SURE
                {
                    let around = PixelBox::around([&a, &b], 0.25 * a.distance(&b));
                    boxes.extend(around.and_then(|b| b.clipped(self.height, self.width)));
                }
            }
        }
        boxes
    }

    /// A box around each hand.
    pub fn hand_boxes(&self) -> Vec<PixelBox> {
        self.hands.iter().filter_map(|h| h.area.clipped(self.height, self.width)).collect()
    }

    /// The number of limb ends that are visible: hands or wrists, feet or ankles.
    pub fn num_limb_ends(&self, skeleton: &Skeleton) -> usize {
        skeleton.limb_ends().into_iter().map(|k| self.peaks[k].len()).sum()
    }

    /// Hands of a network without hand keypoints, from elbows and wrists.
    ///
    /// Centre `wrist + 0.33 (wrist - elbow)`, side `1.5 max(|wrist - elbow|, 0.9 |elbow - shoulder|)`, none below
    /// `smallest` pixels.
    /// As OpenPose does it: `handDetector.cpp` of <https://github.com/CMU-Perceptual-Computing-Lab/openpose>.
    pub fn add_hands_at_wrists(&mut self, skeleton: &Skeleton, smallest: f32) {
        for person in &self.persons {
            for side in ["left", "right"] {
                let found = |part: &str| {
                    let keypoint = person.keypoints[skeleton.index(&format!("{side}_{part}"))?]?;
                    (keypoint.score >= SURE).then_some(keypoint)
                };
                let (Some(elbow), Some(wrist)) = (found("elbow"), found("wrist")) else { continue };
                let upper_arm = found("shoulder").map_or(0.0, |shoulder| shoulder.distance(&elbow));
                let length = 1.5 * wrist.distance(&elbow).max(0.9 * upper_arm);
                if length >= smallest {
                    let (x, y) = (wrist.x + 0.33 * (wrist.x - elbow.x), wrist.y + 0.33 * (wrist.y - elbow.y));
                    let area = PixelBox::square(x, y, length);
                    self.hands.push(Hand { side, score: wrist.score, area, points: Vec::new() });
                }
            }
        }
    }

    /// Hands of a network with hand keypoints: one at each of their peaks, half a forearm in size where the person's
    /// elbow is known, else `side` pixels.
    pub fn add_hands_at_peaks(&mut self, skeleton: &Skeleton, side: f32) {
        for k in skeleton.hands() {
            let name = &skeleton.keypoints()[k];
            let which = ["left", "right"].into_iter().find(|s| name.starts_with(s)).unwrap_or("");
            let elbow = skeleton.index(&format!("{which}_elbow"));
            for peak in &self.peaks[k] {
                let owner = self.persons.iter().find(|p| p.keypoints[k] == Some(*peak));
                let elbow = owner.and_then(|p| p.keypoints[elbow?]);
                let side = elbow.map_or(side, |e| (0.5 * e.distance(peak)).max(side));
                let area = PixelBox::square(peak.x, peak.y, side);
                self.hands.push(Hand { side: which, score: peak.score, area, points: Vec::new() });
            }
        }
    }

    /// What a program may want to know.
    pub fn to_json(&self, skeleton: &Skeleton) -> serde_json::Value {
        let person = |person: &Person| {
            let named = skeleton.keypoints().iter().zip(&person.keypoints);
            let keypoints: serde_json::Map<String, serde_json::Value> =
                named.filter_map(|(name, k)| Some((name.clone(), serde_json::json!((*k)?)))).collect();
            serde_json::json!({"score": person.score, "keypoints": keypoints})
        };
        let soft: serde_json::Map<String, serde_json::Value> =
            skeleton.keypoints().iter().cloned().zip(self.soft_counts.iter().map(|c| serde_json::json!(c))).collect();
        serde_json::json!({
            "height": self.height,
            "width": self.width,
            "counts": {
                "persons": self.persons.len(),
                "hands": self.hands.len(),
                "limb_ends": self.num_limb_ends(skeleton),
            },
            "persons": self.persons.iter().map(person).collect::<Vec<_>>(),
            "boxes": {
                "persons": self.person_boxes(),
                "limbs": self.limb_boxes(skeleton),
                "hands": self.hand_boxes(),
            },
            "hands": self.hands,
            "soft_counts": soft,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_follow_the_keypoints_and_stay_inside() {
        let skeleton = Skeleton::of(&["left_shoulder", "left_elbow", "left_wrist"]);
        let point = |x, y| Some(Keypoint { x, y, score: 0.9 });
        let person = Person { score: 0.9, keypoints: vec![point(10.0, 10.0), point(10.0, 50.0), point(40.0, 50.0)] };
        let mut found = Detection {
            height: 80,
            width: 60,
            persons: vec![person],
            hands: Vec::new(),
            peaks: vec![vec![]; 3],
            soft_counts: vec![0.0; 3],
        };
        found.add_hands_at_wrists(&skeleton, 20.0);
        // Side 1.5 * max(30, 0.9 * 40) = 54 around x 40 + 9.9.
        let area = found.hands[0].area;
        assert!((area.x0 - 22.9).abs() < 1e-4 && (area.width() - 54.0).abs() < 1e-4, "{area:?}");
        assert_eq!(found.hand_boxes()[0].x1, 60.0);
        let limbs = found.limb_boxes(&skeleton);
        assert_eq!(limbs[0], PixelBox { x0: 0.0, y0: 0.0, x1: 20.0, y1: 60.0 });
        assert_eq!(limbs[1], PixelBox { x0: 2.5, y0: 42.5, x1: 47.5, y1: 57.5 });
        found.rescale(160, 30);
        assert_eq!(found.persons[0].keypoints[2].map(|k| (k.x, k.y)), Some((20.0, 100.0)));
        found.hands.clear();
        found.add_hands_at_wrists(&skeleton, 1e4);
        assert!(found.hands.is_empty(), "too small");
    }
}
