//! One key of an adapter file: which module it names, in which spelling, and which part of the adapter it holds.
//!
//! Key conventions: diffusers `transformer.<m>.lora_A.weight`; PEFT `base_model.model.<m>.lora_A.weight`;
//! kohya and musubi `lora_unet_<m_>.lora_down.weight`; ai-toolkit, diffusion-pipe and ComfyUI
//! `diffusion_model.<m>...`; DiffSynth and Lightning `<m>...`; SimpleTuner's LyCORIS `lycoris_<m_>...`;
//! OneTrainer `lora_transformer_<m_>...` or `transformer.<m>.lora_down.weight`.

use crate::adapters::read::table::ModuleTable;

/// The network that a module belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Component {
    /// The diffusion transformer.
    Transformer,
    /// The text encoder's language model.
    TextEncoder,
}

/// What stands before the module's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Prefix {
    /// Nothing.
    Bare,
    /// `transformer.`
    Transformer,
    /// `diffusion_model.`, also behind `model.`
    DiffusionModel,
    /// `base_model.model.`
    Peft,
    /// `lora_unet_`, dots as underscores
    LoraUnet,
    /// `lycoris_`, dots as underscores
    Lycoris,
    /// `lora_transformer_`, dots as underscores
    LoraTransformer,
    /// `text_encoder.` or `lora_te_`
    TextEncoder,
}

impl Prefix {
    /// As it stands in the file.
    pub fn text(self) -> &'static str {
        match self {
            Self::Bare => "",
            Self::Transformer => "transformer.",
            Self::DiffusionModel => "diffusion_model.",
            Self::Peft => "base_model.model.",
            Self::LoraUnet => "lora_unet_",
            Self::Lycoris => "lycoris_",
            Self::LoraTransformer => "lora_transformer_",
            Self::TextEncoder => "text_encoder.",
        }
    }
}

/// Which tensor of a module's adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // the names are those in the files
pub enum Part {
    LoraA,
    LoraB,
    Alpha,
    Magnitude,
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
}

impl Part {
    /// The canonical name in files.
    pub fn text(self) -> &'static str {
        match self {
            Self::LoraA => "lora_A",
            Self::LoraB => "lora_B",
            Self::Alpha => "alpha",
            Self::Magnitude => "dora_scale",
            Self::HadaW1A => "hada_w1_a",
            Self::HadaW1B => "hada_w1_b",
            Self::HadaW2A => "hada_w2_a",
            Self::HadaW2B => "hada_w2_b",
            Self::LokrW1 => "lokr_w1",
            Self::LokrW1A => "lokr_w1_a",
            Self::LokrW1B => "lokr_w1_b",
            Self::LokrW2 => "lokr_w2",
            Self::LokrW2A => "lokr_w2_a",
            Self::LokrW2B => "lokr_w2_b",
        }
    }
}

/// How the part is spelled; readers differ in which spellings they know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PartStyle {
    /// `.lora_A.weight`
    Ab,
    /// `.lora_A.default.weight`, with an adapter's name
    AbNamed,
    /// `.lora_A` without `.weight`
    AbPlain,
    /// `.lora_down.weight`
    DownUp,
    /// `.lora.down.weight`, `_lora.down.weight`, `.lora_linear_layer.down.weight`
    DotDownUp,
    /// `.hada_*`, `.lokr_*`
    Lycoris,
    /// `.alpha`
    Alpha,
    /// `.dora_scale`
    DoraScale,
    /// `.lora_magnitude_vector`, with or without `.weight`
    MagnitudeVector,
}

/// A key understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The network.
    pub component: Component,
    /// The module's dotted name, without prefix.
    pub module: String,
    /// The part of its adapter.
    pub part: Part,
    /// How the module is spelled.
    pub prefix: Prefix,
    /// How the part is spelled.
    pub style: PartStyle,
}

/// Why a key means nothing here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stranger {
    /// No part of any known kind of adapter.
    NotAPart,
    /// A part of a kind that is not supported: what it is.
    Unsupported(&'static str),
    /// A part of an adapter of a module that the network does not have.
    NoModule(Component, String),
    /// A flattened name in the text encoder, whose modules are not known without a base.
    TextEncoderUnknown,
}

impl Stranger {
    /// The reason in words, to follow the key; with the nearest name in `table` where that can help.
    pub fn reason(&self, table: &ModuleTable) -> String {
        match self {
            Self::NotAPart => "is no part of any known kind of adapter".into(),
            Self::Unsupported(what) => format!("is {what}"),
            Self::NoModule(Component::TextEncoder, _) => "names no module of the text encoder".into(),
            Self::NoModule(Component::Transformer, name) => match table.nearest(name) {
                Some(near) => format!("names no module of the transformer; the nearest is `{near}`"),
                None => "names no module of the transformer".into(),
            },
            Self::TextEncoderUnknown => {
                "belongs to the text encoder, whose modules are not known without a base".into()
            }
        }
    }
}

/// Markers of parts, longest first where one begins another.
const MARKERS: [(&str, Part, PartStyle); 24] = [
    (".lora_A", Part::LoraA, PartStyle::Ab),
    (".lora_B", Part::LoraB, PartStyle::Ab),
    (".lora_down", Part::LoraA, PartStyle::DownUp),
    (".lora_up", Part::LoraB, PartStyle::DownUp),
    (".lora.down", Part::LoraA, PartStyle::DotDownUp),
    (".lora.up", Part::LoraB, PartStyle::DotDownUp),
    ("_lora.down", Part::LoraA, PartStyle::DotDownUp),
    ("_lora.up", Part::LoraB, PartStyle::DotDownUp),
    (".lora_linear_layer.down", Part::LoraA, PartStyle::DotDownUp),
    (".lora_linear_layer.up", Part::LoraB, PartStyle::DotDownUp),
    (".alpha", Part::Alpha, PartStyle::Alpha),
    (".dora_scale", Part::Magnitude, PartStyle::DoraScale),
    (".lora_magnitude_vector", Part::Magnitude, PartStyle::MagnitudeVector),
    (".magnitude", Part::Magnitude, PartStyle::MagnitudeVector),
    (".hada_w1_a", Part::HadaW1A, PartStyle::Lycoris),
    (".hada_w1_b", Part::HadaW1B, PartStyle::Lycoris),
    (".hada_w2_a", Part::HadaW2A, PartStyle::Lycoris),
    (".hada_w2_b", Part::HadaW2B, PartStyle::Lycoris),
    (".lokr_w1_a", Part::LokrW1A, PartStyle::Lycoris),
    (".lokr_w1_b", Part::LokrW1B, PartStyle::Lycoris),
    (".lokr_w2_a", Part::LokrW2A, PartStyle::Lycoris),
    (".lokr_w2_b", Part::LokrW2B, PartStyle::Lycoris),
    (".lokr_w1", Part::LokrW1, PartStyle::Lycoris),
    (".lokr_w2", Part::LokrW2, PartStyle::Lycoris),
];

/// Parts that other tools write and that mean no change of a linear layer's weight.
const UNSUPPORTED: [(&str, &str); 11] = [
    (".lora_mid", "part of an adapter on a convolution"),
    (".hada_t1", "part of an adapter on a convolution"),
    (".hada_t2", "part of an adapter on a convolution"),
    (".lokr_t1", "part of an adapter on a convolution"),
    (".lokr_t2", "part of an adapter on a convolution"),
    (".diff", "a full difference of a weight, not a low-rank adapter"),
    (".diff_b", "a difference of a bias, which adapters here do not change"),
    (".w_norm", "a difference of a norm's weight, which adapters here do not change"),
    (".b_norm", "a difference of a norm's bias, which adapters here do not change"),
    (".set_weight", "a replaced weight, not a low-rank adapter"),
    (".reshape_weight", "an adapter that widens its layer"),
];

/// Reads a key against the tables of the networks. The text encoder's table may be absent: then its dotted names are
/// taken as they are.
///
/// Errors: why the key means nothing here.
pub fn parse_key(key: &str, table: &ModuleTable, text_encoder: Option<&ModuleTable>) -> Result<Key, Stranger> {
    for (marker, what) in UNSUPPORTED {
        if find_marker(key, marker).is_some() {
            return Err(Stranger::Unsupported(what));
        }
    }
    let (stem, part, style) = MARKERS
        .iter()
        .find_map(|&(marker, part, style)| {
            let (stem, rest) = find_marker(key, marker)?;
            Some((stem, part, part_style(style, rest)?))
        })
        .ok_or(if key.ends_with(".bias") && key.contains(".lora_") {
            Stranger::Unsupported("a bias of an adapter, which adapters here do not have")
        } else {
            Stranger::NotAPart
        })?;
    let (component, module, prefix) = find_module(stem, table, text_encoder)?;
    Ok(Key { component, module, part, prefix, style })
}

/// Splits at the marker, where it ends at a dot or the key's end.
fn find_marker<'a>(key: &'a str, marker: &str) -> Option<(&'a str, &'a str)> {
    let at = key.find(marker)?;
    let rest = &key[at + marker.len()..];
    (at > 0 && (rest.is_empty() || rest.starts_with('.'))).then(|| (&key[..at], rest))
}

/// What may follow a marker: nothing, `.weight`, or adapter names and `.weight`.
fn part_style(style: PartStyle, rest: &str) -> Option<PartStyle> {
    let names: Vec<&str> = rest.split('.').skip(1).collect();
    let (weight, adapters) = match names.split_last() {
        Some((&"weight", adapters)) => (true, adapters),
        Some((&"bias", _)) => return None,
        _ => (false, &names[..]),
    };
    if adapters.iter().any(|a| a.is_empty() || *a == "weight") {
        return None;
    }
    match (style, weight, adapters.is_empty()) {
        (PartStyle::Ab, true, true) => Some(PartStyle::Ab),
        (PartStyle::Ab, true, false) => Some(PartStyle::AbNamed),
        (PartStyle::Ab, false, true) => Some(PartStyle::AbPlain),
        (PartStyle::DownUp | PartStyle::DotDownUp, true, true) => Some(style),
        (PartStyle::MagnitudeVector | PartStyle::Lycoris, _, _) => Some(style),
        (PartStyle::Alpha | PartStyle::DoraScale, false, true) => Some(style),
        _ => None,
    }
}

const FLAT: [(&str, Prefix); 5] = [
    ("lora_unet_", Prefix::LoraUnet),
    ("lora_prior_unet_", Prefix::LoraUnet),
    ("lycoris_", Prefix::Lycoris),
    ("lora_transformer_", Prefix::LoraTransformer),
    ("transformer_lora_", Prefix::LoraTransformer),
];
const FLAT_TEXT: [&str; 4] = ["lora_te_", "lora_te1_", "lora_text_encoder_", "lycoris_te_"];
const DOTTED: [(&str, Prefix); 5] = [
    ("base_model.model.", Prefix::Peft),
    ("transformer.", Prefix::Transformer),
    ("diffusion_model.", Prefix::DiffusionModel),
    ("model.diffusion_model.", Prefix::DiffusionModel),
    ("model.", Prefix::DiffusionModel),
];

fn find_module(
    stem: &str,
    table: &ModuleTable,
    text_encoder: Option<&ModuleTable>,
) -> Result<(Component, String, Prefix), Stranger> {
    let stranger = |component, name: &str| Stranger::NoModule(component, name.to_string());
    for flat in FLAT_TEXT {
        if let Some(rest) = stem.strip_prefix(flat) {
            let table = text_encoder.ok_or(Stranger::TextEncoderUnknown)?;
            let dotted = table.unflatten(rest).or_else(|| table.unflatten(&text_name(rest)));
            return match dotted {
                Some(dotted) => Ok((Component::TextEncoder, dotted.to_string(), Prefix::TextEncoder)),
                None => Err(stranger(Component::TextEncoder, rest)),
            };
        }
    }
    for (flat, prefix) in FLAT {
        if let Some(rest) = stem.strip_prefix(flat) {
            return match table.unflatten(rest) {
                Some(dotted) => Ok((Component::Transformer, dotted.to_string(), prefix)),
                None => Err(stranger(Component::Transformer, rest)),
            };
        }
    }
    let mut name = stem;
    let mut first = None;
    while !table.contains(name) {
        if let Some(rest) = name.strip_prefix("text_encoder.") {
            let rest = text_name(rest);
            return match text_encoder {
                Some(table) if !table.contains(&rest) => Err(stranger(Component::TextEncoder, &rest)),
                _ => Ok((Component::TextEncoder, rest, Prefix::TextEncoder)),
            };
        }
        let stripped = DOTTED.iter().find_map(|(text, prefix)| Some((name.strip_prefix(text)?, *prefix)));
        let Some((rest, prefix)) = stripped else {
            return Err(stranger(Component::Transformer, name));
        };
        first = first.or(Some(prefix));
        name = rest;
    }
    Ok((Component::Transformer, name.to_string(), first.unwrap_or(Prefix::Bare)))
}

/// Text encoder modules by the names of the published checkpoint; newer transformers versions nest them deeper.
pub fn text_name(name: &str) -> String {
    for (new, old) in [
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        ("model_language_model_", "model_"),
        ("model_visual_", "visual_"),
    ] {
        if let Some(rest) = name.strip_prefix(new) {
            return format!("{old}{rest}");
        }
    }
    name.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::target::ModuleInfo;

    fn table(names: &[&str]) -> ModuleTable {
        let info = |n: &&str| ModuleInfo { name: n.to_string(), in_features: 4, out_features: 6, groups: vec![] };
        ModuleTable::new(&names.iter().map(info).collect::<Vec<_>>())
    }

    fn parse(key: &str) -> Result<Key, String> {
        let table = table(&["transformer_blocks.7.attn.to_out.0", "proj_out"]);
        parse_key(key, &table, None).map_err(|e| e.reason(&table))
    }

    #[test]
    fn every_spelling_of_the_module_and_the_part_is_understood() {
        use Part::{HadaW1A, LokrW1, LokrW2B, LoraA, LoraB, Magnitude};
        use PartStyle::{Ab, AbNamed, AbPlain, DoraScale, DotDownUp, DownUp, MagnitudeVector};
        use Prefix::{Bare, DiffusionModel, LoraTransformer, LoraUnet, Lycoris, Peft, Transformer};
        for (key, prefix, part, style) in [
            ("transformer.transformer_blocks.7.attn.to_out.0.lora_A.weight", Transformer, LoraA, Ab),
            ("diffusion_model.transformer_blocks.7.attn.to_out.0.lora_B.weight", DiffusionModel, LoraB, Ab),
            (
                "model.diffusion_model.transformer_blocks.7.attn.to_out.0.alpha",
                DiffusionModel,
                Part::Alpha,
                PartStyle::Alpha,
            ),
            ("base_model.model.transformer_blocks.7.attn.to_out.0.lora_A.default.weight", Peft, LoraA, AbNamed),
            ("base_model.model.transformer.transformer_blocks.7.attn.to_out.0.lora_B.weight", Peft, LoraB, Ab),
            ("transformer_blocks.7.attn.to_out.0.lora_A.default_0.default.weight", Bare, LoraA, AbNamed),
            ("transformer_blocks.7.attn.to_out.0.lora_A", Bare, LoraA, AbPlain),
            ("transformer_blocks.7.attn.to_out.0.lora_up.weight", Bare, LoraB, DownUp),
            ("transformer_blocks.7.attn.to_out.0.lora.down.weight", Bare, LoraA, DotDownUp),
            ("transformer_blocks.7.attn.to_out.0_lora.up.weight", Bare, LoraB, DotDownUp),
            ("lora_unet_transformer_blocks_7_attn_to_out_0.lora_down.weight", LoraUnet, LoraA, DownUp),
            ("lycoris_transformer_blocks_7_attn_to_out_0.lokr_w1", Lycoris, LokrW1, PartStyle::Lycoris),
            ("lycoris_transformer_blocks_7_attn_to_out_0.lokr_w2_b", Lycoris, LokrW2B, PartStyle::Lycoris),
            (
                "lora_transformer_transformer_blocks_7_attn_to_out_0.hada_w1_a",
                LoraTransformer,
                HadaW1A,
                PartStyle::Lycoris,
            ),
            (
                "transformer.transformer_blocks.7.attn.to_out.0.lora_magnitude_vector",
                Transformer,
                Magnitude,
                MagnitudeVector,
            ),
            (
                "base_model.model.transformer_blocks.7.attn.to_out.0.lora_magnitude_vector.default.weight",
                Peft,
                Magnitude,
                MagnitudeVector,
            ),
            ("lora_unet_transformer_blocks_7_attn_to_out_0.dora_scale", LoraUnet, Magnitude, DoraScale),
        ] {
            let module = "transformer_blocks.7.attn.to_out.0".to_string();
            let want = Key { component: Component::Transformer, module, part, prefix, style };
            assert_eq!(parse(key), Ok(want), "{key}");
        }
    }

    #[test]
    fn what_is_not_understood_says_why() {
        for (key, why) in [
            (
                "lora_unet_transformer_blocks_7_attn_to_out.lora_down.weight",
                "the nearest is `transformer_blocks.7.attn.to_out.0`",
            ),
            ("transformer.transformer_blocks.8.attn.to_out.0.lora_A.weight", "names no module"),
            ("transformer.proj_out.lora_B.bias", "bias of an adapter"),
            ("proj_out.lora_mid.weight", "convolution"),
            ("proj_out.diff", "full difference"),
            ("proj_out.weight", "no part of any known kind"),
            ("proj_out.lora_A.weight.weight", "no part"),
            ("proj_out.lora_Astray.weight", "no part"),
            (".lora_A.weight", "no part"),
            ("lora_te_model_layers_0_mlp_up_proj.lora_up.weight", "text encoder"),
        ] {
            let error = parse(key).unwrap_err();
            assert!(error.contains(why), "{key}: {error}");
        }
    }

    #[test]
    fn text_encoder_keys_are_told_apart_from_the_transformers() {
        let text = table(&["model.layers.0.mlp.up_proj"]);
        let transformer = table(&["proj_out"]);
        for key in [
            "text_encoder.model.layers.0.mlp.up_proj.lora_A.weight",
            "text_encoder.model.language_model.layers.0.mlp.up_proj.lora_A.weight",
            "lora_te_model_layers_0_mlp_up_proj.lora_down.weight",
            "lora_te1_model_language_model_layers_0_mlp_up_proj.lora_down.weight",
        ] {
            let parsed = parse_key(key, &transformer, Some(&text)).unwrap();
            assert_eq!(
                (parsed.component, parsed.module.as_str()),
                (Component::TextEncoder, "model.layers.0.mlp.up_proj")
            );
        }
        assert!(parse_key("text_encoder.model.layers.0.mlp.up.lora_A.weight", &transformer, Some(&text)).is_err());
        assert!(parse("text_encoder.anything.lora_A.weight").is_ok());
    }
}
