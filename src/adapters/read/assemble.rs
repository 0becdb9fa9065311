//! From keys to modules: groups the parts, checks that they are whole and fit, and settles the scale.

use super::alpha::{AlphaSource, StatedAlpha};
use super::key::{Component, Part, parse_key};
use super::{AdapterFile, Kind, ModuleEntry, Problem, ReadOptions, SourceKey, count};
use crate::io::floats::is_float;
use crate::io::safetensors::MappedFile;
use safetensors::Dtype;
use std::collections::BTreeMap;

/// No linear layer has more elements; small factors of a corrupt file can multiply out to more memory than there is.
const MAX_ELEMENTS: usize = 1 << 30;

type Keys = BTreeMap<Part, SourceKey>;

impl AdapterFile {
    pub(super) fn assemble(file: MappedFile, config_file: Option<&str>, options: &ReadOptions) -> Self {
        let metadata = file.metadata();
        let stated = StatedAlpha::new(&metadata, config_file);
        let (modules, mut problems) = group(&file, options);
        let rslora = metadata.get("scaling").is_some_and(|s| s == "rslora");
        let scales = Scales { file: &file, given: options.alpha, rslora, stated: &stated };
        let (mut transformer, mut text_encoder) = (BTreeMap::new(), BTreeMap::new());
        for ((component, name), keys) in modules {
            let shapes = |part: Part| Some(file.info(&keys.get(&part)?.key)?.1);
            let any = keys.values().next().expect("a module is made by a key").key.clone();
            let expected = match component {
                Component::Transformer => options.table.shape(&name),
                Component::TextEncoder => options.text_encoder.and_then(|t| t.shape(&name)),
            };
            let entry = shape_of(&keys, &any, shapes, expected).and_then(|form| {
                let first = keys.iter().find(|(part, _)| !matches!(part, Part::Alpha | Part::Magnitude));
                let dtype = file.info(&first.expect("shape_of wants factors").1.key).expect("a key of this file").0;
                let (alpha, scale, alpha_source) = scales.of(component, &name, &keys, form.rank)?;
                let dora = keys.contains_key(&Part::Magnitude);
                let Form { kind, shape, rank } = form;
                Ok(ModuleEntry { kind, shape, rank, alpha, scale, alpha_source, dora, dtype, keys: keys.clone() })
            });
            match entry {
                Err(problem) => problems.push(problem),
                Ok(entry) => {
                    let modules =
                        if component == Component::Transformer { &mut transformer } else { &mut text_encoder };
                    modules.insert(name, entry);
                }
            }
        }
        let mut adapter = Self { file, transformer, text_encoder, problems, warnings: Vec::new(), stated };
        adapter.warnings = warnings(&adapter);
        adapter
    }
}

/// The parts of every module, and the keys that have no place.
fn group(file: &MappedFile, options: &ReadOptions) -> (BTreeMap<(Component, String), Keys>, Vec<Problem>) {
    let mut modules: BTreeMap<(Component, String), Keys> = BTreeMap::new();
    let mut problems = Vec::new();
    for name in file.names() {
        let parsed = match parse_key(&name, options.table, options.text_encoder) {
            Ok(parsed) => parsed,
            Err(stranger) => {
                problems.push(Problem::Stranger(name, stranger));
                continue;
            }
        };
        let (dtype, _) = file.info(&name).expect("a name of this file");
        let integer_alpha = parsed.part == Part::Alpha && matches!(dtype, Dtype::I64 | Dtype::I32);
        if !integer_alpha && !is_float(dtype) {
            problems.push(Problem::Misshapen(name, format!("is stored as {dtype:?}, which no adapter uses")));
            continue;
        }
        let parts = modules.entry((parsed.component, parsed.module)).or_default();
        match parts.get(&parsed.part) {
            Some(first) => problems.push(Problem::Twice(name, first.key.clone())),
            None => {
                parts.insert(parsed.part, SourceKey { key: name, prefix: parsed.prefix, style: parsed.style });
            }
        }
    }
    (modules, problems)
}

struct Form {
    kind: Kind,
    shape: (usize, usize),
    rank: Option<usize>,
}

/// Rows and columns of a factor; adapters of 1x1 convolutions carry two more dimensions of one.
pub(super) fn matrix_shape(shape: &[usize]) -> Option<(usize, usize)> {
    match *shape {
        [rows, cols] | [rows, cols, 1, 1] => Some((rows, cols)),
        _ => None,
    }
}

/// Whether DoRA's norms are of the rows (out) or of the columns (in) of the weight.
pub(super) fn magnitude_is_of_rows(shape: &[usize], (out, _): (usize, usize)) -> bool {
    match *shape {
        [n] => n == out,
        [n, 1] => n == out,
        _ => false,
    }
}

/// What the parts make, if they are whole and fit each other and the model.
fn shape_of<'a>(
    keys: &Keys,
    any: &str,
    shapes: impl Fn(Part) -> Option<&'a [usize]>,
    expected: Option<(usize, usize)>,
) -> Result<Form, Problem> {
    let misshapen = |how: String| Problem::Misshapen(any.to_string(), how);
    let missing = |part: Part| {
        let present = keys.values().next().map_or(any, |k| k.key.as_str());
        Problem::Incomplete(present.to_string(), part.text())
    };
    let factor = |part: Part| -> Result<(usize, usize), Problem> {
        let shape = shapes(part).ok_or_else(|| missing(part))?;
        let matrix = matrix_shape(shape).filter(|(rows, cols)| *rows > 0 && *cols > 0);
        matrix.ok_or_else(|| {
            let key = keys[&part].key.clone();
            Problem::Misshapen(key, format!("has shape {shape:?}, which is no factor of a linear layer's adapter"))
        })
    };
    // Two factors with an inner dimension in common: (rows, cols, rank).
    let product = |left: Part, right: Part| -> Result<(usize, usize, usize), Problem> {
        let (l, r) = (factor(left)?, factor(right)?);
        if l.1 != r.0 {
            return Err(misshapen(format!("and the other factor do not multiply: {l:?} by {r:?}")));
        }
        Ok((l.0, r.1, l.1))
    };
    let has = |parts: &[Part]| parts.iter().any(|p| keys.contains_key(p));
    let lora = has(&[Part::LoraA, Part::LoraB]);
    let loha = has(&[Part::HadaW1A, Part::HadaW1B, Part::HadaW2A, Part::HadaW2B]);
    let lokr_w1 = [Part::LokrW1, Part::LokrW1A, Part::LokrW1B];
    let lokr_w2 = [Part::LokrW2, Part::LokrW2A, Part::LokrW2B];
    let lokr = has(&lokr_w1) || has(&lokr_w2);
    let form = match (lora, loha, lokr) {
        (true, false, false) => {
            let (a, b) = (factor(Part::LoraA)?, factor(Part::LoraB)?);
            if b.1 != a.0 {
                let swapped = a.1 == b.0 && expected.is_none_or(|shape| shape == (a.0, b.1));
                return Err(if swapped {
                    Problem::Swapped(any.to_string())
                } else {
                    misshapen(format!("has A of shape {a:?} and B of shape {b:?}, which do not multiply"))
                });
            }
            Form { kind: Kind::Lora, shape: (b.0, a.1), rank: Some(a.0) }
        }
        (false, true, false) => {
            let w1 = product(Part::HadaW1A, Part::HadaW1B)?;
            let w2 = product(Part::HadaW2A, Part::HadaW2B)?;
            if (w1.0, w1.1) != (w2.0, w2.1) {
                return Err(misshapen("belongs to two products of different shapes".into()));
            }
            Form { kind: Kind::Loha, shape: (w1.0, w1.1), rank: Some(w1.2) }
        }
        (false, false, true) => {
            let side = |parts: [Part; 3]| -> Result<(usize, usize, Option<usize>), Problem> {
                let [full, left, right] = parts;
                if !has(&[left, right]) {
                    let (rows, cols) = factor(full)?;
                    return Ok((rows, cols, None));
                }
                if let Some(both) = keys.get(&full) {
                    return Err(Problem::Twice(both.key.clone(), left.text().into()));
                }
                let (rows, cols, rank) = product(left, right)?;
                Ok((rows, cols, Some(rank)))
            };
            let (w1, w2) = (side(lokr_w1)?, side(lokr_w2)?);
            let product = |x: usize, y: usize| x.checked_mul(y).ok_or_else(|| misshapen("is too large".into()));
            Form { kind: Kind::Lokr, shape: (product(w1.0, w2.0)?, product(w1.1, w2.1)?), rank: w2.2.or(w1.2) }
        }
        (false, false, false) => return Err(missing(Part::LoraA)),
        _ => return Err(misshapen("belongs to a module with parts of different kinds of adapter".into())),
    };
    if form.shape.0.saturating_mul(form.shape.1) > MAX_ELEMENTS {
        return Err(misshapen(format!("is for a weight of shape {:?}, larger than any", form.shape)));
    }
    if let Some(expected) = expected.filter(|e| *e != form.shape) {
        let swapped = form.kind == Kind::Lora && (form.shape.1, form.shape.0) == expected;
        return Err(if swapped {
            Problem::Swapped(any.to_string())
        } else {
            misshapen(format!("is for a weight of shape {:?}, the model has {expected:?}", form.shape))
        });
    }
    if let Some(shape) = shapes(Part::Magnitude) {
        let (out, width) = form.shape;
        let fits = magnitude_is_of_rows(shape, form.shape) || shape == [width] || shape == [1, width];
        if !fits {
            let how = format!("has shape {shape:?}: neither {out} rows nor {width} columns have norms like that");
            return Err(Problem::Misshapen(keys[&Part::Magnitude].key.clone(), how));
        }
    }
    Ok(form)
}

/// What decides the scales of a file.
struct Scales<'a> {
    file: &'a MappedFile,
    given: Option<f64>,
    rslora: bool,
    stated: &'a StatedAlpha,
}

impl Scales<'_> {
    /// Alpha as stated, the scale, and where it comes from, for one module.
    fn of(
        &self,
        component: Component,
        name: &str,
        keys: &Keys,
        rank: Option<usize>,
    ) -> Result<(Option<f64>, f64, AlphaSource), Problem> {
        let stored = match keys.get(&Part::Alpha) {
            None => None,
            Some(source) => Some(
                scalar(self.file, &source.key)
                    .ok_or_else(|| Problem::Misshapen(source.key.clone(), "is not one finite number".into()))?,
            ),
        };
        let Some(rank) = rank else {
            // Two full LoKr factors. LyCORIS stores an alpha there that nobody applies; PEFT applies alpha / r.
            let config = self.stated.transformer.as_ref().or(self.stated.config_file.as_ref());
            let peft = config.and_then(|c| Some((c.alpha_of(name)?, c.rank_of(name).filter(|r| *r > 0)?)));
            return Ok(match (stored, peft) {
                (None, Some((alpha, rank))) => (Some(alpha), alpha / rank as f64, AlphaSource::Metadata),
                _ => (stored, 1.0, AlphaSource::NotNeeded),
            });
        };
        let divisor = if self.rslora { (rank as f64).sqrt() } else { rank as f64 };
        if let Some(alpha) = stored {
            return Ok((Some(alpha), alpha / divisor, AlphaSource::Key));
        }
        let stated = self.stated.of(component == Component::TextEncoder, name, rank);
        Ok(match self.given {
            Some(alpha) if stated.2 == AlphaSource::Assumed => (Some(alpha), alpha / rank as f64, AlphaSource::Given),
            _ => stated,
        })
    }
}

/// A tensor of one element, of a float or integer type.
fn scalar(file: &MappedFile, key: &str) -> Option<f64> {
    let (dtype, shape) = file.info(key)?;
    if shape.iter().product::<usize>() != 1 {
        return None;
    }
    let bytes = file.bytes(key).ok()?;
    let value = match dtype {
        Dtype::I64 => i64::from_le_bytes(bytes.try_into().ok()?) as f64,
        Dtype::I32 => f64::from(i32::from_le_bytes(bytes.try_into().ok()?)),
        _ => f64::from(*file.floats(key).ok()?.first()?),
    };
    value.is_finite().then_some(value)
}

fn warnings(adapter: &AdapterFile) -> Vec<String> {
    let mut out = Vec::new();
    let with = |source: AlphaSource| adapter.entries().filter(|e| e.alpha_source == source).count();
    let assumed = with(AlphaSource::Assumed);
    if assumed > 0 {
        out.push(format!(
            "no alpha is stored for {}: taken at scale 1, as its readers do. If it was trained with alpha other than \
             rank, give it with `--alpha`",
            count(assumed, "module")
        ));
    }
    if with(AlphaSource::Key) > 0 && adapter.stated.transformer.is_some() {
        out.push(
            "alpha stands both in keys and in the metadata: used once here, but diffusers applies both (`convert` \
             writes a file without this trap)"
                .into(),
        );
    }
    let config = adapter.stated.transformer.as_ref().or(adapter.stated.config_file.as_ref());
    if let Some(config) = config {
        let differs = |(name, e): (&String, &ModuleEntry)| {
            e.rank.zip(config.rank_of(name)).filter(|(tensor, said)| e.kind == Kind::Lora && tensor != said)
        };
        if let Some((tensor, said)) = adapter.transformer.iter().find_map(differs) {
            out.push(format!(
                "the metadata says rank {said} where tensors have rank {tensor}: the tensors' rank is used, but \
                 diffusers and PEFT refuse such a file"
            ));
        }
    }
    out
}
