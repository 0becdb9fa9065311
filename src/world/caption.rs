//! What a scene is called: a few wordings in English and in Chinese.

use crate::rng::{Purpose, Stream};
use crate::world::Scene;
use serde::{Deserialize, Serialize};

/// The language of a caption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Language {
    /// English.
    English,
    /// Chinese.
    Chinese,
}

/// One way to put a scene into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Caption {
    /// The language.
    pub language: Language,
    /// 0 to 3.
    pub wording: usize,
}

const fn caption(language: Language, wording: usize) -> Caption {
    Caption { language, wording }
}

impl Caption {
    /// Every wording; the languages take turns.
    pub const ALL: [Self; 8] = [
        caption(Language::English, 0),
        caption(Language::Chinese, 0),
        caption(Language::English, 1),
        caption(Language::Chinese, 1),
        caption(Language::English, 2),
        caption(Language::Chinese, 2),
        caption(Language::English, 3),
        caption(Language::Chinese, 3),
    ];

    /// The wording of picture `item` of `seed`.
    pub fn draw(seed: u64, item: u64) -> Self {
        Self::ALL[Stream::new(seed, 2, item, Purpose::World).below(Self::ALL.len())]
    }

    /// The words for `scene`.
    pub fn text(self, scene: Scene) -> String {
        match self.language {
            Language::English => english(scene, self.wording),
            Language::Chinese => chinese(scene, self.wording),
        }
    }
}

fn english(scene: Scene, wording: usize) -> String {
    let number = ["no", "one", "two", "three", "four"][scene.count()];
    let plural = if scene.count() == 1 { "" } else { "s" };
    let colour = scene.colour().english();
    let place = match scene {
        Scene::Figures { count: 2, .. } => "side by side",
        _ => scene.place().english(),
    };
    match scene {
        Scene::Objects { shape, .. } => {
            let things = format!("{}{plural}", shape.english());
            match wording {
                0 => format!("{number} {colour} {things} {place}"),
                1 => format!("{place}, {number} {colour} {things}"),
                2 => format!("a picture of {number} {colour} {things} {place}"),
                _ => format!("{number} {things} in {colour}, {place}"),
            }
        }
        Scene::Figures { pose, .. } => {
            let pose = pose.english();
            match wording {
                0 => format!("{number} {colour} figure{plural} {pose}, {place}"),
                1 => format!("{place}, {number} {colour} figure{plural} {pose}"),
                2 => format!("a picture of {number} {colour} figure{plural} {place}, {pose}"),
                _ => format!("{number} figure{plural} in {colour} {pose}, {place}"),
            }
        }
    }
}

fn chinese(scene: Scene, wording: usize) -> String {
    let number = ["零个", "一个", "两个", "三个", "四个"][scene.count()];
    let colour = scene.colour().chinese();
    let place = scene.place().chinese();
    match scene {
        Scene::Objects { shape, .. } => {
            let shape = shape.chinese();
            match wording {
                0 => format!("{place}有{number}{colour}的{shape}"),
                1 => format!("{number}{colour}{shape}在{place}"),
                2 => format!("一幅画，{place}是{number}{colour}的{shape}"),
                _ => format!("{colour}的{shape}，{number}，在{place}"),
            }
        }
        Scene::Figures { count, pose, .. } => {
            let pose = pose.chinese();
            let place = if count == 2 { "并排" } else { place };
            match wording {
                0 => format!("{place}有{number}{colour}的小人，{pose}"),
                1 => format!("{number}{colour}小人{pose}，在{place}"),
                2 => format!("一幅画，{place}是{number}{pose}的{colour}小人"),
                _ => format!("{number}穿{colour}衣服的小人在{place}，{pose}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{Colour, Place, Pose, Shape};

    #[test]
    fn every_wording_names_every_attribute() {
        for scene in Scene::all_objects().into_iter().chain(Scene::all_figures()) {
            let all: std::collections::BTreeSet<_> = Caption::ALL.iter().map(|c| c.text(scene)).collect();
            assert_eq!(all.len(), Caption::ALL.len());
        }
        let scene = Scene::Objects { count: 2, colour: Colour::Red, shape: Shape::Circle, place: Place::Left };
        assert_eq!(Caption::ALL[0].text(scene), "two red circles on the left");
        assert_eq!(Caption::ALL[1].text(scene), "左边有两个红色的圆形");
        let scene = Scene::Figures { count: 1, colour: Colour::Blue, pose: Pose::WavingLeft, place: Place::Right };
        assert_eq!(Caption::ALL[0].text(scene), "one blue figure waving the left hand, on the right");
        assert_eq!(Caption::ALL[1].text(scene), "右边有一个蓝色的小人，挥着左手");
    }
}
