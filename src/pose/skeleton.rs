//! The keypoints of a network and how they hang together, told by their names.

/// Keypoints in the order of the maps' channels, and the limbs between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skeleton {
    keypoints: Vec<String>,
    limbs: Vec<(usize, usize)>,
}

/// What a count term counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// The name in the metrics: `hands`, `limb ends`, or `keypoints` of a network that knows neither.
    pub what: &'static str,
    /// Channels whose masses are counted together: left and right of one kind.
    pub groups: Vec<Vec<usize>>,
}

/// The keypoint of a network that finds hands without saying whose they are, and whether left or right.
pub const HAND: &str = "hand";

/// Names that are limbs when a network has both ends.
const LIMBS: [(&str, &str); 34] = [
    ("head", "neck"),
    ("nose", "neck"),
    ("nose", "left_eye"),
    ("nose", "right_eye"),
    ("left_eye", "left_ear"),
    ("right_eye", "right_ear"),
    ("neck", "left_shoulder"),
    ("neck", "right_shoulder"),
    ("left_shoulder", "right_shoulder"),
    ("left_shoulder", "left_elbow"),
    ("left_elbow", "left_wrist"),
    ("left_elbow", "left_hand"),
    ("left_wrist", "left_hand"),
    ("right_shoulder", "right_elbow"),
    ("right_elbow", "right_wrist"),
    ("right_elbow", "right_hand"),
    ("right_wrist", "right_hand"),
    ("left_shoulder", "left_hip"),
    ("right_shoulder", "right_hip"),
    ("left_hip", "right_hip"),
    ("neck", "pelvis"),
    ("neck", "hip"),
    ("neck", "left_hip"),
    ("neck", "right_hip"),
    ("pelvis", "left_knee"),
    ("pelvis", "right_knee"),
    ("hip", "left_knee"),
    ("hip", "right_knee"),
    ("left_hip", "left_knee"),
    ("left_knee", "left_ankle"),
    ("left_knee", "left_foot"),
    ("right_hip", "right_knee"),
    ("right_knee", "right_ankle"),
    ("right_knee", "right_foot"),
];

impl Skeleton {
    /// A skeleton of keypoints by name, with the limbs that those names imply: `left_elbow` and `left_wrist` make one.
    pub fn of(names: &[impl AsRef<str>]) -> Self {
        let keypoints: Vec<String> = names.iter().map(|n| n.as_ref().into()).collect();
        let at = |name: &str| keypoints.iter().position(|k| k == name);
        let has = |name: &str| at(name).is_some();
        let implied = |&(a, b): &(&str, &str)| {
            // A wrist stands between elbow and hand, a shoulder between neck and hip, where the network knows it.
            let skipped = (a.ends_with("elbow") && b.ends_with("hand") && has(&b.replace("hand", "wrist")))
                || (a == "neck" && b.ends_with("_hip") && has(&b.replace("hip", "shoulder")))
                || (a.ends_with("_shoulder") && b.ends_with("_shoulder") && has("neck"));
            (!skipped).then_some((at(a)?, at(b)?))
        };
        let limbs = LIMBS.iter().filter_map(implied).collect();
        Self { keypoints, limbs }
    }

    /// The same keypoints with other limbs, by index.
    pub fn with_limbs(mut self, limbs: Vec<(usize, usize)>) -> Self {
        self.limbs = limbs;
        self
    }

    /// The same with one more keypoint, which is joined to none.
    pub fn with_keypoint(&self, name: &str) -> Self {
        let mut wider = self.clone();
        wider.keypoints.push(name.into());
        wider
    }

    /// Names, in the order of the maps.
    pub fn keypoints(&self) -> &[String] {
        &self.keypoints
    }

    /// Pairs of keypoints that are joined.
    pub fn limbs(&self) -> &[(usize, usize)] {
        &self.limbs
    }

    /// The index of a keypoint.
    pub fn index(&self, name: &str) -> Option<usize> {
        self.keypoints.iter().position(|k| k == name)
    }

    /// Keypoints that are hands.
    pub fn hands(&self) -> Vec<usize> {
        self.ending_in(&["hand"])
    }

    /// Hands or wrists, and feet or ankles.
    pub fn limb_ends(&self) -> Vec<usize> {
        self.end_groups().concat()
    }

    /// The ends of arms and those of legs, as far as there are any.
    fn end_groups(&self) -> Vec<Vec<usize>> {
        let either = |a: &str, b: &str| {
            let found = self.ending_in(&[a]);
            if found.is_empty() { self.ending_in(&[b]) } else { found }
        };
        [either("hand", "wrist"), either("foot", "ankle")].into_iter().filter(|g| !g.is_empty()).collect()
    }

    /// Joined pairs that belong to an arm or a leg.
    pub fn arms_and_legs(&self) -> Vec<(usize, usize)> {
        let outer = self.ending_in(&["elbow", "wrist", "hand", "knee", "ankle", "foot"]);
        self.limbs.iter().copied().filter(|(_, end)| outer.contains(end)).collect()
    }

    /// What is counted: hands where the network knows them, else limb ends, else all keypoints.
    pub fn counted(&self) -> Counted {
        match (self.hands(), self.end_groups()) {
            (hands, _) if !hands.is_empty() => Counted { what: "hands", groups: vec![hands] },
            (_, ends) if !ends.is_empty() => Counted { what: "limb ends", groups: ends },
            _ => Counted { what: "keypoints", groups: (0..self.keypoints.len()).map(|k| vec![k]).collect() },
        }
    }

    fn ending_in(&self, ends: &[&str]) -> Vec<usize> {
        let matches = |name: &String| ends.iter().any(|e| name == e || name.ends_with(&format!("_{e}")));
        (0..self.keypoints.len()).filter(|&k| matches(&self.keypoints[k])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_imply_limbs_and_what_is_counted() {
        let photo = Skeleton::of(&["nose", "left_shoulder", "left_elbow", "left_wrist", "left_hip"]);
        assert_eq!(photo.limbs(), [(1, 2), (2, 3), (1, 4)]);
        assert_eq!((photo.counted().what, photo.counted().groups), ("limb ends", vec![vec![3]]));
        assert_eq!(photo.arms_and_legs(), [(1, 2), (2, 3)]);

        let drawn = Skeleton::of(&["head", "neck", "left_elbow", "left_hand", "right_hand", "left_foot"]);
        assert_eq!(drawn.limbs(), [(0, 1), (2, 3)]);
        assert_eq!((drawn.counted().what, drawn.counted().groups), ("hands", vec![vec![3, 4]]));
        assert_eq!(drawn.limb_ends(), [3, 4, 5]);
        assert_eq!(Skeleton::of(&["a", "b"]).counted().what, "keypoints");

        let with_hands = photo.with_keypoint(HAND);
        assert_eq!(with_hands.limbs(), photo.limbs());
        assert_eq!((with_hands.counted().what, with_hands.counted().groups), ("hands", vec![vec![5]]));
    }
}
