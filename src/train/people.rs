//! Who is in the images of the data set: one look of the pose network at each, kept by content.

use crate::cache::{Entry, FillOptions, Key, Store, fill};
use crate::config::Config;
use crate::data::{Counts, Dataset, Selection, Size, filter};
use crate::error::{Error, Result};
use crate::pose::{Detection, PixelBox, Skeleton, detect_image};
use crate::train::regions::{self, Boxes, Edges};
use crate::train::run::Options;
use crate::train::{interrupt, setup};
use candle_core::{DType, Device, Tensor};

/// What was found in one image.
#[derive(Clone, Debug, PartialEq)]
pub struct People {
    /// How many there are.
    pub counts: Counts,
    /// Where they are, in pixels of the image.
    pub boxes: Boxes,
}

/// The counts of an entry: (3,) in i64, persons, hands, legs.
const COUNTS: &str = "counts";
/// The boxes of an entry: (n, 5) in f32, kind (0 person, 1 limb, 2 hand) and edges; absent if there are none.
const BOXES: &str = "boxes";

impl People {
    /// Counts and boxes of a detection.
    pub fn new(found: &Detection, skeleton: &Skeleton) -> Self {
        let edges = |boxes: Vec<PixelBox>| boxes.into_iter().map(|b| [b.x0, b.y0, b.x1, b.y1]).collect::<Vec<Edges>>();
        let boxes = Boxes {
            persons: edges(found.person_boxes()),
            limbs: edges(found.limb_boxes(skeleton)),
            hands: edges(found.hand_boxes()),
        };
        let counts = Counts { persons: found.persons.len(), hands: boxes.hands.len(), legs: num_legs(found, skeleton) };
        Self { counts, boxes }
    }

    fn to_entry(&self) -> Result<Entry> {
        let Counts { persons, hands, legs } = self.counts;
        let counts = Tensor::new(&[persons as i64, hands as i64, legs as i64], &Device::Cpu)?;
        let mut entry = Entry::from([(COUNTS.to_string(), counts)]);
        let kinds = [&self.boxes.persons, &self.boxes.limbs, &self.boxes.hands];
        let rows: Vec<f32> = kinds
            .into_iter()
            .enumerate()
            .flat_map(|(kind, boxes)| boxes.iter().flat_map(move |b| [kind as f32, b[0], b[1], b[2], b[3]]))
            .collect();
        if !rows.is_empty() {
            entry.insert(BOXES.into(), Tensor::from_slice(&rows, (rows.len() / 5, 5), &Device::Cpu)?);
        }
        Ok(entry)
    }

    fn from_entry(entry: &Entry) -> Result<Self> {
        let unreadable =
            || Error::run("a cache entry about the people in an image is incomplete").hint("remove the cache folder");
        let counts = entry.get(COUNTS).ok_or_else(unreadable)?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let [persons, hands, legs] = counts[..] else { return Err(unreadable()) };
        let mut boxes = Boxes::default();
        for row in entry.get(BOXES).map(|t| t.to_vec2::<f32>()).transpose()?.unwrap_or_default() {
            let [kind, edges @ ..] = &row[..] else { return Err(unreadable()) };
            let edges: Edges = edges.try_into().map_err(|_| unreadable())?;
            match *kind as usize {
                0 => boxes.persons.push(edges),
                1 => boxes.limbs.push(edges),
                _ => boxes.hands.push(edges),
            }
        }
        let counts = Counts { persons: persons as usize, hands: hands as usize, legs: legs as usize };
        Ok(Self { counts, boxes })
    }
}

/// The legs that are to be seen: on each side as many as there are knees, ankles or feet, whichever are most.
fn num_legs(found: &Detection, skeleton: &Skeleton) -> usize {
    let peaks = |name: String| skeleton.index(&name).map_or(0, |k| found.peaks[k].len());
    let of_side = |side| ["knee", "ankle", "foot"].map(|part| peaks(format!("{side}_{part}"))).into_iter().max();
    ["left", "right"].into_iter().filter_map(of_side).sum()
}

impl People {
    /// Who is in each image of `dataset`, if the config asks for it anywhere; else nothing. What was found before is taken
    /// from the cache, and what is found now goes there; a dry run reads and writes none, and looks only if the choice of
    /// images depends on it.
    ///
    /// Errors: a corrupt image; no such pose network; interrupted between two images.
    pub fn of(config: &Config, dataset: &Dataset, options: Options) -> Result<Vec<Self>> {
        let stages = config.stages.spans(config.training.max_steps)?;
        let chosen_by_people = filter::asks_for_people(&config.data.filter)
            || stages.iter().any(|(_, stage)| Selection::asks_for_people(&stage.filter));
        if !(chosen_by_people || (regions::wants_boxes(config)? && !options.dry_run)) {
            return Ok(Vec::new());
        }
        let network = setup::pose_network(config)?;
        let look = |item: usize| -> Result<Self> {
            if interrupt::requested() {
                return Err(Error::interrupted("stopped while looking for people in the images")
                    .hint("run it again: what was found stays"));
            }
            Ok(Self::new(&detect_image(&*network, &dataset.load(item)?)?, network.skeleton()))
        };
        let items = dataset.items();
        if options.dry_run {
            return (0..items.len()).map(look).collect();
        }
        let store = Store::open(&config.cache_dir())?;
        let keys: Vec<Key> = items.iter().map(|item| Key::people(&item.image_hash, network.fingerprint())).collect();
        let fill_options = FillOptions { label: "people in the images", batch_size: 1, quiet: options.quiet };
        fill(&store, &keys, fill_options, |missing| missing.iter().map(|&item| look(item)?.to_entry()).collect())?;
        keys.iter().map(|key| Self::from_entry(&store.require(key)?)).collect()
    }
}

/// In how many images there is somebody; nothing if nobody was looked for. `weighs`: the loss depends on it.
pub fn notice(people: &[People], weighs: bool) -> Option<String> {
    let found = people.iter().filter(|people| people.counts.persons > 0).count();
    match (found, people.len()) {
        (_, 0) => None,
        (0, n) if weighs => {
            Some(format!("no person was found in any of the {n} images: the weights of `regions` do nothing"))
        }
        (found, n) => Some(format!("persons were found in {found} of {n} images")),
    }
}

/// Size and boxes of each image, for the weights of regions; empty if nobody was looked for.
pub fn boxes(dataset: &Dataset, people: Vec<People>) -> Vec<(Size, Boxes)> {
    dataset.items().iter().zip(people).map(|(item, people)| (item.size, people.boxes)).collect()
}
