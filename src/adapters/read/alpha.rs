//! Where a module's alpha comes from: its own key, the metadata in the header, PEFT's `adapter_config.json` beside
//! the file, or nowhere; then alpha is the rank and the scale 1, which is what the readers of such files apply.

use serde_json::Value;
use std::collections::BTreeMap;

/// Where the scale of a module was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AlphaSource {
    /// Given by the user for a file that states none.
    Given,
    /// An `.alpha` key.
    Key,
    /// `lora_adapter_metadata` in the header.
    Metadata,
    /// `adapter_config.json` beside the file.
    ConfigFile,
    /// `ss_network_alpha` in the header.
    NetworkAlpha,
    /// Nothing says: alpha is taken as the rank.
    Assumed,
    /// Full LoKr factors have no rank and no scale.
    NotNeeded,
}

impl AlphaSource {
    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Given => "given",
            Self::Key => "alpha keys",
            Self::Metadata => "lora_adapter_metadata",
            Self::ConfigFile => "adapter_config.json",
            Self::NetworkAlpha => "ss_network_alpha",
            Self::Assumed => "none stored: alpha = rank",
            Self::NotNeeded => "none needed",
        }
    }
}

/// PEFT's configuration of an adapter, as far as the scale depends on it.
#[derive(Clone, Debug, Default)]
pub struct PeftConfig {
    /// `r`
    pub rank: Option<usize>,
    /// `lora_alpha`, or `alpha` of a LoKr or LoHa
    pub alpha: Option<f64>,
    /// `use_rslora`
    pub rslora: bool,
    /// `rank_pattern`, sorted
    pub rank_pattern: Vec<(String, f64)>,
    /// `alpha_pattern`, sorted
    pub alpha_pattern: Vec<(String, f64)>,
}

impl PeftConfig {
    /// From a JSON object; keys that start with `prefix` are taken without it, and if there is one, no others.
    /// `None` if it states neither a rank nor an alpha.
    pub fn from_json(json: &Value, prefix: &str) -> Option<Self> {
        let object = json.as_object()?;
        let get = |key: &str| object.get(&format!("{prefix}{key}"));
        let pattern = |key: &str| {
            let entries = get(key).and_then(Value::as_object).into_iter().flatten();
            entries.filter_map(|(k, v)| Some((k.clone(), v.as_f64()?))).collect()
        };
        let config = Self {
            rank: get("r").and_then(Value::as_u64).map(|r| r as usize),
            alpha: get("lora_alpha").or_else(|| get("alpha")).and_then(Value::as_f64),
            rslora: get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            rank_pattern: pattern("rank_pattern"),
            alpha_pattern: pattern("alpha_pattern"),
        };
        (config.rank.is_some() || config.alpha.is_some()).then_some(config)
    }

    /// The rank that PEFT would give this module; its tensors must have it.
    pub fn rank_of(&self, module: &str) -> Option<usize> {
        matching(&self.rank_pattern, module).map(|r| r as usize).or(self.rank)
    }

    /// The scale that PEFT applies to this module, whose tensors have `rank`.
    pub fn scale_of(&self, module: &str, rank: usize) -> Option<f64> {
        let alpha = self.alpha_of(module)?;
        Some(alpha / if self.rslora { (rank as f64).sqrt() } else { rank as f64 })
    }

    /// The alpha that PEFT gives this module.
    pub fn alpha_of(&self, module: &str) -> Option<f64> {
        matching(&self.alpha_pattern, module).or(self.alpha)
    }
}

/// The value of the first pattern that matches: PEFT tries `(.*\.)?(pattern)$`. A pattern that is no regular
/// expression to us is compared as a name.
fn matching(patterns: &[(String, f64)], module: &str) -> Option<f64> {
    let matches = |pattern: &str| match regex::Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$")) {
        Ok(regex) => regex.is_match(module),
        Err(_) => pattern == module,
    };
    patterns.iter().find(|(pattern, _)| matches(pattern)).map(|(_, value)| *value)
}

/// What a file says about its scale, apart from alpha keys.
#[derive(Clone, Debug, Default)]
pub struct StatedAlpha {
    /// `lora_adapter_metadata`, its `transformer.` keys.
    pub transformer: Option<PeftConfig>,
    /// `lora_adapter_metadata`, its `text_encoder.` keys.
    pub text_encoder: Option<PeftConfig>,
    /// `adapter_config.json` beside the file.
    pub config_file: Option<PeftConfig>,
    /// `ss_network_alpha`.
    pub network_alpha: Option<f64>,
}

impl StatedAlpha {
    /// From a file's metadata and the text of the `adapter_config.json` beside it.
    pub fn new(metadata: &BTreeMap<String, String>, config_file: Option<&str>) -> Self {
        let json = |text: &str| serde_json::from_str::<Value>(text).ok();
        let adapter = metadata.get("lora_adapter_metadata").and_then(|t| json(t));
        let config = |prefix: &str| adapter.as_ref().and_then(|j| PeftConfig::from_json(j, prefix));
        Self {
            transformer: config("transformer."),
            text_encoder: config("text_encoder."),
            config_file: config_file.and_then(json).and_then(|j| PeftConfig::from_json(&j, "")),
            network_alpha: metadata.get("ss_network_alpha").and_then(|a| a.parse().ok()).filter(|a: &f64| *a > 0.0),
        }
    }

    /// Alpha, scale and their source for a module without an alpha key.
    pub fn of(&self, text_encoder: bool, module: &str, rank: usize) -> (Option<f64>, f64, AlphaSource) {
        let metadata = if text_encoder { &self.text_encoder } else { &self.transformer };
        for (config, source) in [(metadata, AlphaSource::Metadata), (&self.config_file, AlphaSource::ConfigFile)] {
            let config = config.as_ref();
            if let Some(scale) = config.and_then(|c| c.scale_of(module, rank)) {
                return (config.and_then(|c| c.alpha_of(module)), scale, source);
            }
        }
        match self.network_alpha {
            Some(alpha) => (Some(alpha), alpha / rank as f64, AlphaSource::NetworkAlpha),
            None => (None, 1.0, AlphaSource::Assumed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn patterns_mean_what_they_mean_to_peft() {
        let config = PeftConfig::from_json(
            &json!({"r": 4, "lora_alpha": 8, "use_rslora": false,
                "alpha_pattern": {"^b\\.to_q": 1, "to_q": 2, "mlp": 3, "(": 9}, "rank_pattern": {"to_q": 16}}),
            "",
        )
        .unwrap();
        // `mlp` is no suffix at a dot of `b.xmlp`; `^` anchors at the start of the whole name.
        for (module, alpha) in [
            ("b.to_q", 1.0),
            ("c.b.to_q", 2.0),
            ("to_q", 2.0),
            ("a.mlp", 3.0),
            ("b.xmlp", 8.0),
            ("mlp.a", 8.0),
            ("(", 9.0),
        ] {
            assert_eq!(config.alpha_of(module), Some(alpha), "{module}");
        }
        assert_eq!((config.rank_of("x.to_q"), config.rank_of("x")), (Some(16), Some(4)));
    }

    #[test]
    fn sources_come_in_their_order() {
        let both = json!({"transformer.r": 4, "transformer.lora_alpha": 8.0, "text_encoder.lora_alpha": 2});
        let metadata: BTreeMap<_, _> = [
            ("lora_adapter_metadata".to_string(), both.to_string()),
            ("ss_network_alpha".to_string(), "16.0".to_string()),
        ]
        .into();
        let file = r#"{"r": 4, "lora_alpha": 6, "use_rslora": true}"#;
        let stated = StatedAlpha::new(&metadata, Some(file));
        assert_eq!(stated.of(false, "m", 4), (Some(8.0), 2.0, AlphaSource::Metadata));
        assert_eq!(stated.of(true, "m", 4), (Some(2.0), 0.5, AlphaSource::Metadata));
        let stated = StatedAlpha { transformer: None, ..stated };
        assert_eq!(stated.of(false, "m", 4), (Some(6.0), 3.0, AlphaSource::ConfigFile));
        let stated = StatedAlpha { config_file: None, ..stated };
        assert_eq!(stated.of(false, "m", 4), (Some(16.0), 4.0, AlphaSource::NetworkAlpha));
        let none = StatedAlpha::new(&BTreeMap::new(), Some("not json"));
        assert_eq!(none.of(false, "m", 4), (None, 1.0, AlphaSource::Assumed));
    }
}
