//! Which scenes are kept from training, and which scene the n-th picture of a seed shows.

use crate::error::{Error, Result};
use crate::rng::{Purpose, Stream};
use crate::world::{Caption, Scene};
use clap::ValueEnum;

/// Percentage of the scenes that are held out.
const HELD_OUT_PERCENT: u32 = 15;

/// Percentage of the pictures that show figures.
const FIGURES_PERCENT: usize = 40;

/// Percentage of the pictures with figures that show two.
const TWO_FIGURES_PERCENT: usize = 15;

/// The two halves of the world. A scene, in whatever words, belongs to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Split {
    /// Scenes to train on
    Train,
    /// Combinations of attributes that training never shows; each attribute alone it does show
    HeldOut,
}

/// What kinds of pictures are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Six in ten with objects, four with figures
    All,
    /// Objects only
    Objects,
    /// Stick figures only
    Figures,
}

impl Split {
    /// The half that `scene` belongs to: by a hash of its attributes, which never changes.
    pub fn of(scene: Scene) -> Self {
        let key = serde_json::to_string(&scene).expect("a scene is plain data");
        let hash = blake3::hash(key.as_bytes());
        let word = u32::from_le_bytes(hash.as_bytes()[..4].try_into().expect("4 bytes"));
        if word % 100 < HELD_OUT_PERCENT { Self::HeldOut } else { Self::Train }
    }
}

/// The scenes of one split, ready to draw from.
pub struct Pool {
    kind: Kind,
    objects: Vec<Scene>,
    single: Vec<Scene>,
    double: Vec<Scene>,
}

impl Pool {
    /// The scenes of `split` that `kind` allows.
    pub fn new(split: Split, kind: Kind) -> Self {
        let of = |scenes: Vec<Scene>| scenes.into_iter().filter(|&s| Split::of(s) == split);
        let (single, double) = of(Scene::all_figures()).partition(|s| s.count() == 1);
        Self { kind, objects: of(Scene::all_objects()).collect(), single, double }
    }

    /// Every scene of the pool.
    pub fn scenes(&self) -> Vec<Scene> {
        let objects = self.objects.iter().filter(|_| self.kind != Kind::Figures);
        let figures = self.single.iter().chain(&self.double).filter(|_| self.kind != Kind::Objects);
        objects.chain(figures).copied().collect()
    }

    /// The scene of picture `item` of `seed`. It does not depend on other pictures.
    pub fn draw(&self, seed: u64, item: u64) -> Scene {
        let mut stream = Stream::new(seed, 0, item, Purpose::World);
        let figures = match self.kind {
            Kind::All => stream.below(100) < FIGURES_PERCENT,
            Kind::Objects => false,
            Kind::Figures => true,
        };
        let two = stream.below(100) < TWO_FIGURES_PERCENT && !self.double.is_empty();
        let from = match (figures, two) {
            (false, _) => &self.objects,
            (true, false) => &self.single,
            (true, true) => &self.double,
        };
        from[stream.below(from.len())]
    }

    /// `count` different prompts (scene and wording), in an order that depends on `seed`: every scene once before any
    /// comes in a second wording.
    ///
    /// Errors (usage): there are not so many.
    pub fn prompts(&self, seed: u64, count: usize) -> Result<Vec<(Scene, Caption)>> {
        let scenes = self.scenes();
        let all = scenes.len() * Caption::ALL.len();
        if count > all {
            return Err(Error::usage(format!("there are no {count} different prompts"))
                .expected(format!("at most {all}"), count));
        }
        let order = Stream::new(seed, 1, 0, Purpose::World).permutation(scenes.len());
        let prompt = |i: usize| {
            let (round, position) = (i / scenes.len(), i % scenes.len());
            // Neighbours come in different wordings and languages.
            (scenes[order[position]], Caption::ALL[(round + position) % Caption::ALL.len()])
        };
        Ok((0..count).map(prompt).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{Colour, Place, Pose, Shape};
    use std::collections::BTreeSet;

    #[test]
    fn held_out_scenes_are_new_combinations_of_known_attributes() {
        let [train, held_out] = [Split::Train, Split::HeldOut].map(|s| Pool::new(s, Kind::All));
        assert!(train.scenes().iter().all(|s| !held_out.scenes().contains(s)));
        assert_eq!(train.scenes().len() + held_out.scenes().len(), 700 + 108 + 12);
        // Every pair of attributes is trained on; only the whole is new.
        let mut pairs = BTreeSet::new();
        for scene in train.scenes() {
            match scene {
                Scene::Objects { count, colour, shape, place } => {
                    pairs.extend([
                        format!("{colour:?}{shape:?}"),
                        format!("{count}{shape:?}"),
                        format!("{count}{place:?}"),
                    ]);
                    pairs.extend([format!("{colour:?}{place:?}"), format!("{shape:?}{place:?}")]);
                }
                Scene::Figures { colour, pose, place, count } => {
                    pairs.extend([
                        format!("{colour:?}{pose:?}"),
                        format!("{count}{pose:?}"),
                        format!("{pose:?}{place:?}"),
                    ]);
                }
            }
        }
        let objects = Colour::ALL.len() * (Shape::ALL.len() + Place::ALL.len()) + 4 * 5 + 4 * 5 + Shape::ALL.len() * 5;
        let figures = Colour::CLOTHES.len() * Pose::ALL.len() + Pose::ALL.len() + 2 + Pose::ALL.len() * 3;
        assert_eq!(pairs.len(), objects + figures);
    }

    #[test]
    fn there_are_500_different_held_out_prompts() {
        let prompts = Pool::new(Split::HeldOut, Kind::All).prompts(0, 500).unwrap();
        let texts: BTreeSet<_> = prompts.iter().map(|(scene, caption)| caption.text(*scene)).collect();
        assert_eq!(texts.len(), 500);
        let figures = prompts.iter().filter(|(s, _)| s.is_figures()).count();
        assert!(figures > 50, "{figures}");
        assert_eq!(prompts, Pool::new(Split::HeldOut, Kind::All).prompts(0, 500).unwrap());
        assert_ne!(prompts, Pool::new(Split::HeldOut, Kind::All).prompts(1, 500).unwrap());
    }
}
