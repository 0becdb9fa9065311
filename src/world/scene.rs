//! What a picture of the world shows: the attributes, their words and the list of all scenes.

use serde::{Deserialize, Serialize};

/// An enum without fields, with its English and Chinese words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$member_doc:meta])* $member:ident = $english:literal, $chinese:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name {
            $($(#[$member_doc])* $member,)*
        }

        impl $name {
            /// Every value.
            pub const ALL: &[Self] = &[$(Self::$member,)*];

            /// The English word.
            pub fn english(self) -> &'static str {
                match self { $(Self::$member => $english,)* }
            }

            /// The Chinese word.
            pub fn chinese(self) -> &'static str {
                match self { $(Self::$member => $chinese,)* }
            }
        }
    };
}

words! {
    /// Colour of the objects, or of a figure's clothes.
    Colour {
        /// Hue near 0.
        Red = "red", "红色";
        /// Hue near 30.
        Orange = "orange", "橙色";
        /// Hue near 52.
        Yellow = "yellow", "黄色";
        /// Hue near 135.
        Green = "green", "绿色";
        /// Hue near 220.
        Blue = "blue", "蓝色";
        /// Hue near 285.
        Purple = "purple", "紫色";
        /// No hue. Only objects are black: a figure's shoes are.
        Black = "black", "黑色";
    }
}

words! {
    /// Form of the objects.
    Shape {
        /// A disc.
        Circle = "circle", "圆形";
        /// Upright.
        Square = "square", "正方形";
        /// Equilateral, point up.
        Triangle = "triangle", "三角形";
        /// Five points.
        Star = "star", "星形";
        /// Point down.
        Heart = "heart", "心形";
    }
}

words! {
    /// Where the group of objects, or the one figure, is.
    Place {
        /// Left third.
        Left = "on the left", "左边";
        /// Right third.
        Right = "on the right", "右边";
        /// Upper third; objects only.
        Top = "at the top", "上方";
        /// Lower third; objects only.
        Bottom = "at the bottom", "下方";
        /// Middle.
        Centre = "in the centre", "中间";
    }
}

words! {
    /// What a figure does. It looks at the viewer: its right hand is on the left of the picture.
    Pose {
        /// Arms hang down, a little away from the body.
        Standing = "standing", "站着";
        /// Both arms point up.
        ArmsUp = "with both arms up", "举着双手";
        /// Both arms are level.
        ArmsOut = "with arms stretched out", "张开双臂";
        /// Left forearm up, right arm down.
        WavingLeft = "waving the left hand", "挥着左手";
        /// Right forearm up, left arm down.
        WavingRight = "waving the right hand", "挥着右手";
        /// Legs wide apart.
        Walking = "walking", "在走路";
    }
}

impl Colour {
    /// The colours of clothes.
    pub const CLOTHES: &[Self] = &[Self::Red, Self::Orange, Self::Yellow, Self::Green, Self::Blue, Self::Purple];

    /// sRGB, 0 to 255.
    pub fn rgb(self) -> [f32; 3] {
        match self {
            Self::Red => [214.0, 36.0, 44.0],
            Self::Orange => [243.0, 132.0, 20.0],
            Self::Yellow => [240.0, 208.0, 28.0],
            Self::Green => [38.0, 160.0, 72.0],
            Self::Blue => [36.0, 92.0, 220.0],
            Self::Purple => [140.0, 52.0, 178.0],
            Self::Black => [30.0, 30.0, 34.0],
        }
    }
}

impl Place {
    /// The places of single figures.
    pub const FIGURES: &[Self] = &[Self::Left, Self::Centre, Self::Right];

    /// Where the middle of the group is, in parts of the picture's side.
    pub fn middle(self) -> [f32; 2] {
        match self {
            Self::Left => [0.24, 0.5],
            Self::Right => [0.76, 0.5],
            Self::Top => [0.5, 0.24],
            Self::Bottom => [0.5, 0.76],
            Self::Centre => [0.5, 0.5],
        }
    }
}

impl Pose {
    /// The poses that are narrow enough for two in a picture.
    pub const NARROW: &[Self] = &[Self::Standing, Self::ArmsUp];
}

/// What a picture shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Scene {
    /// Equal objects.
    Objects {
        /// 1 to 4.
        count: usize,
        /// Of each.
        colour: Colour,
        /// Of each.
        shape: Shape,
        /// Of the group.
        place: Place,
    },
    /// Stick figures.
    Figures {
        /// 1 or 2. Two stand side by side, one left and one right of the middle.
        count: usize,
        /// Of the clothes.
        colour: Colour,
        /// Of each.
        pose: Pose,
        /// Left, centre or right; centre for two.
        place: Place,
    },
}

impl Scene {
    /// The most objects of a picture.
    pub const MAX_OBJECTS: usize = 4;

    /// Every scene with objects.
    pub fn all_objects() -> Vec<Self> {
        let mut all = Vec::new();
        for count in 1..=Self::MAX_OBJECTS {
            for &colour in Colour::ALL {
                for &shape in Shape::ALL {
                    all.extend(Place::ALL.iter().map(|&place| Self::Objects { count, colour, shape, place }));
                }
            }
        }
        all
    }

    /// Every scene with figures.
    pub fn all_figures() -> Vec<Self> {
        let mut all = Vec::new();
        for &colour in Colour::CLOTHES {
            for &pose in Pose::ALL {
                all.extend(Place::FIGURES.iter().map(|&place| Self::Figures { count: 1, colour, pose, place }));
            }
            let two = |&pose| Self::Figures { count: 2, colour, pose, place: Place::Centre };
            all.extend(Pose::NARROW.iter().map(two));
        }
        all
    }

    /// How many objects or figures there are.
    pub fn count(self) -> usize {
        match self {
            Self::Objects { count, .. } | Self::Figures { count, .. } => count,
        }
    }

    /// The colour of the objects or clothes.
    pub fn colour(self) -> Colour {
        match self {
            Self::Objects { colour, .. } | Self::Figures { colour, .. } => colour,
        }
    }

    /// Where the group is.
    pub fn place(self) -> Place {
        match self {
            Self::Objects { place, .. } | Self::Figures { place, .. } => place,
        }
    }

    /// Whether it shows figures.
    pub fn is_figures(self) -> bool {
        matches!(self, Self::Figures { .. })
    }
}
