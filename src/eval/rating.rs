//! People as judges: a page that shows the base model's picture and an adapter's side by side without saying which is
//! which, and the answers that come back from it.
//!
//! Order and sides of the pairs are a function of the seed, the criteria and the pictures, and so is the page's name:
//! answers carry seed and criteria, and the sides are found again without a key file. Answers to other pictures do not
//! fit the name and are refused.

use crate::error::{Error, Result};
use crate::eval::measure::{Comparison, pair_cells};
use crate::eval::metrics::PREFERENCE;
use crate::eval::pictures::Picture;
use crate::eval::statistics::{Measure, mcnemar};
use crate::eval::table::{Cell, Table};
use crate::report::pictures::shrunk;
use crate::rng::{Purpose, Stream};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;

/// What is asked about each pair if nothing else is.
pub const CRITERIA: [&str; 3] = ["手脚质量", "面部细节", "风格一致性"];

/// Version of the answers' format.
const FORMAT: u32 = 1;

/// Pictures on the page have at most this side, as JPEG of this quality, both sides alike.
const MAX_SIDE: u32 = 768;
const QUALITY: u8 = 92;

const TEMPLATE: &str = include_str!("rating.html");

/// One page: which pairs it shows, in which order, on which sides.
pub struct Sheet<'a> {
    id: String,
    seed: u64,
    criteria: Vec<String>,
    pairs: Vec<Pair<'a>>,
}

struct Pair<'a> {
    /// Index of the adapter's set.
    set: usize,
    adapter: &'a Picture,
    base: &'a Picture,
    /// Whether A is the adapter's.
    adapter_is_a: bool,
}

/// The answers of one person, as the page exports them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answers {
    format: u32,
    page: String,
    seed: u64,
    criteria: Vec<String>,
    rater: String,
    answers: Vec<Answer>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    pair: usize,
    criterion: String,
    choice: Choice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Choice {
    A,
    B,
    #[serde(rename = "tie")]
    Tie,
}

impl<'a> Sheet<'a> {
    /// The page for all pairs of the comparison.
    ///
    /// Errors (usage): no pairs, no criterion or one twice, a picture that cannot be read.
    pub fn new(comparison: &'a Comparison, criteria: &[String], seed: u64) -> Result<Self> {
        let distinct: BTreeSet<&String> = criteria.iter().collect();
        if criteria.is_empty() || distinct.len() != criteria.len() || criteria.iter().any(|c| c.trim().is_empty()) {
            return Err(Error::usage("wrong criteria for the rating page")
                .expected("one or more different names", format!("`{}`", criteria.join(","))));
        }
        let baseline = &comparison.sets[comparison.baseline];
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        let mut put = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        criteria.iter().for_each(|c| put(c.as_bytes()));
        let mut pairs = Vec::new();
        for (set, own) in comparison.sets.iter().enumerate().filter(|(i, _)| *i != comparison.baseline) {
            for (adapter, base) in own.pairs(baseline).0 {
                put(adapter.key.as_bytes());
                for picture in [adapter, base] {
                    let read = std::fs::read(&picture.path);
                    put(&read.map_err(|e| Error::io("read the picture", &picture.path, e).into_usage())?);
                }
                pairs.push(Pair { set, adapter, base, adapter_is_a: false });
            }
        }
        if pairs.is_empty() {
            return Err(Error::usage("there is no pair of pictures to rate"));
        }
        let id = hasher.finalize().to_hex()[..32].to_string();
        let mut random = Stream::named(seed, &id, Purpose::Rating);
        let mut shuffled: Vec<Pair> = Vec::with_capacity(pairs.len());
        let mut left: Vec<Option<Pair>> = pairs.into_iter().map(Some).collect();
        for i in random.permutation(left.len()) {
            let pair = left[i].take().expect("a permutation names each once");
            shuffled.push(Pair { adapter_is_a: random.below(2) == 0, ..pair });
        }
        Ok(Self { id, seed, criteria: criteria.to_vec(), pairs: shuffled })
    }

    /// The page, with all pictures in it.
    pub fn html(&self) -> Result<String> {
        let mut pairs = Vec::new();
        for pair in &self.pairs {
            let (adapter, base) = (data_uri(pair.adapter)?, data_uri(pair.base)?);
            let (a, b) = if pair.adapter_is_a { (adapter, base) } else { (base, adapter) };
            let prompt = pair.base.prompt.as_ref().or(pair.adapter.prompt.as_ref());
            pairs.push(json!({"a": a, "b": b, "prompt": prompt.map_or("", String::as_str)}));
        }
        let data = json!({
            "format": FORMAT, "page": self.id, "seed": self.seed, "criteria": self.criteria, "pairs": pairs,
        });
        // A prompt must not end the script.
        let data = data.to_string().replace("</", "<\\/");
        Ok(TEMPLATE.replace("/*DATA*/null", &data))
    }

    /// Adds the counted answers to the table: for each criterion the share of pairs in which the adapter's picture was
    /// preferred, among those in which one was.
    fn count(&self, comparison: &Comparison, answers: &[Answers], table: &mut Table) {
        for criterion in &self.criteria {
            let mut counts = vec![[0usize; 3]; comparison.sets.len()]; // wins, losses, ties of the adapter
            let own = answers.iter().flat_map(|a| &a.answers).filter(|a| &a.criterion == criterion);
            for answer in own {
                let pair = &self.pairs[answer.pair];
                let outcome = match answer.choice {
                    Choice::Tie => 2,
                    Choice::A => usize::from(!pair.adapter_is_a),
                    Choice::B => usize::from(pair.adapter_is_a),
                };
                counts[pair.set][outcome] += 1;
            }
            let cells = pair_cells(comparison, |i| {
                let [wins, losses, ties] = counts[i];
                let measure = Measure::rate(wins, wins + losses).map(|m| m.tested(mcnemar(wins, losses)));
                let why = if ties > 0 { "all answers are ties" } else { "no answers" };
                Cell::new(measure, why)
            });
            table.push(PREFERENCE, criterion, cells);
            let ties: usize = counts.iter().map(|c| c[2]).sum();
            if ties > 0 {
                table.note(format!("{criterion}: {ties} ties are left out of the preference"));
            }
        }
    }
}

/// Reads files of answers and puts what they say into the table.
///
/// Errors (usage): a file that cannot be read or is none of answers, answers to other pictures, one file twice.
pub fn add(comparison: &Comparison, files: &[impl AsRef<Path>], table: &mut Table) -> Result<()> {
    let mut pages: Vec<(Sheet, Vec<Answers>)> = Vec::new();
    let mut seen = BTreeSet::new();
    for path in files {
        let path = path.as_ref();
        let answers = Answers::read(path)?;
        let sheet = Sheet::new(comparison, &answers.criteria, answers.seed)?;
        if sheet.id != answers.page {
            return Err(Error::usage(format!("the ratings in `{}` are of another page", path.display()))
                .expected(format!("page {}, of the pictures compared here", sheet.id), answers.page)
                .hint("give the same folders, or the same model, adapters, prompts and seeds, as for `--rate`"));
        }
        answers.check(&sheet, path)?;
        let bytes = std::fs::read(path).map_err(|e| Error::io("read the ratings", path, e).into_usage())?;
        if !seen.insert(bytes) {
            return Err(Error::usage(format!("the ratings in `{}` were given twice", path.display())));
        }
        match pages.iter_mut().find(|(known, _)| known.id == sheet.id) {
            Some((_, all)) => all.push(answers),
            None => pages.push((sheet, vec![answers])),
        }
    }
    for (sheet, answers) in &pages {
        sheet.count(comparison, answers, table);
        if answers.len() > 1 {
            let raters: BTreeSet<&str> = answers.iter().map(|a| a.rater.as_str()).collect();
            table.note(format!(
                "ratings of {} people are pooled; answers to one pair are not independent, so the intervals are somewhat \
                 too narrow",
                raters.len().max(1)
            ));
        }
    }
    Ok(())
}

impl Answers {
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read the ratings", path, e).into_usage())?;
        let answers: Self = serde_json::from_str(&text).map_err(|e| {
            Error::usage(format!("`{}` holds no ratings", path.display()))
                .detail(e.to_string())
                .hint("`--ratings` wants a file that the rating page has exported")
        })?;
        if answers.format != FORMAT {
            return Err(Error::usage(format!("`{}` is of another version", path.display()))
                .expected(format!("format {FORMAT}"), answers.format));
        }
        Ok(answers)
    }

    /// Errors (usage): a pair or criterion that the page does not have, an answer given twice.
    fn check(&self, sheet: &Sheet, path: &Path) -> Result<()> {
        let mut seen = BTreeSet::new();
        let wrong =
            |what: String| Err(Error::usage(format!("the ratings in `{}` are damaged", path.display())).detail(what));
        for Answer { pair, criterion, .. } in &self.answers {
            if *pair >= sheet.pairs.len() {
                return wrong(format!("there is no pair {pair}: the page has {}", sheet.pairs.len()));
            }
            if !self.criteria.contains(criterion) {
                return wrong(format!("`{criterion}` is none of its criteria"));
            }
            if !seen.insert((*pair, criterion)) {
                return wrong(format!("pair {pair} has two answers about `{criterion}`"));
            }
        }
        Ok(())
    }
}

fn data_uri(picture: &Picture) -> Result<String> {
    let image = shrunk(picture.load()?, MAX_SIDE);
    let mut bytes = Vec::new();
    let encoded = JpegEncoder::new_with_quality(&mut bytes, QUALITY).encode_image(&image);
    encoded.map_err(|e| Error::run("cannot encode a picture as JPEG").detail(e.to_string()).source(e))?;
    Ok(format!("data:image/jpeg;base64,{}", STANDARD.encode(bytes)))
}
