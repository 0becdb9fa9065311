//! The reference page and the JSON schema, made from the declarations of the sections.

use crate::config::field::{Field, FieldInfo};
use crate::config::sections::Target;
use crate::config::stages::Stage;
use crate::config::{Config, DERIVED_DEFAULTS};
use serde_json::json;
use std::fmt::Write;

/// The dotted names of all keys.
pub fn keys() -> Vec<String> {
    fn walk(prefix: &str, fields: Vec<FieldInfo>, keys: &mut Vec<String>) {
        for field in fields {
            let key = format!("{prefix}{}", field.name);
            walk(&format!("{key}."), field.fields, keys);
            keys.push(key);
        }
    }
    let mut keys = Vec::new();
    walk("", Config::fields(), &mut keys);
    keys
}

/// The reference page of all keys, in Markdown.
pub fn markdown() -> String {
    let mut page = String::from(HEAD);
    let (sections, plain): (Vec<_>, Vec<_>) = Config::fields().into_iter().partition(|f| !f.fields.is_empty());
    table(&mut page, "", &plain);
    for section in &sections {
        let _ = write!(page, "\n## {}\n\n{}\n\n", section.name, text(section));
        table(&mut page, &format!("{}.", section.name), &section.fields);
        for map in section.fields.iter().filter(|f| !f.fields.is_empty()) {
            sub_table(&mut page, &format!("{}.{}", section.name, map.name), map);
        }
        if section.name == "lora" {
            page.push_str("\nAn entry of `target_modules` as a map:\n\n");
            table(&mut page, "", &Target::fields());
        }
    }
    page.push_str(STAGES);
    let stage = Stage::fields();
    table(&mut page, "", &stage);
    for map in stage.iter().filter(|f| !f.fields.is_empty()) {
        sub_table(&mut page, &format!("stages.N.{}", map.name), map);
    }
    page
}

const HEAD: &str = "\
# The config file

One YAML file describes a run. Only `model` and `data.path` have no default. Unknown keys are errors. Paths are
relative to the folder that the command is run in. `--set training.max_steps=10` overrides any key from the command
line; the value is YAML, and an entry of a list has its index as key (`--set lora.target_modules.0.rank=8`).

This page is made from the source: `qwen-lora config --reference > docs/config.md`. For completion and checks in an
editor, `qwen-lora config --schema > qwen-lora.schema.json`.

## Top level

";

const STAGES: &str = "
## stages

A list of maps, one for each part of the run; see [training.md](training.md).

";

/// A map inside a section.
fn sub_table(page: &mut String, key: &str, map: &FieldInfo) {
    let _ = write!(page, "\n`{key}`: {}\n\n", text(map));
    table(page, &format!("{key}."), &map.fields);
}

fn table(page: &mut String, prefix: &str, fields: &[FieldInfo]) {
    page.push_str("| key | default | value | meaning |\n|---|---|---|---|\n");
    for field in fields {
        let key = format!("{prefix}{}", field.name);
        let default = match (DERIVED_DEFAULTS.iter().find(|(k, _)| *k == key), &field.default) {
            (Some((_, derived)), _) => format!("`{derived}`"),
            (None, Some(_)) if !field.fields.is_empty() => "see below".into(),
            (None, Some(node)) => format!("`{}`", node.inline()),
            (None, None) => "required".into(),
        };
        let _ = writeln!(page, "| `{}` | {default} | {} | {} |", field.name, field.kind, text(field));
    }
}

fn text(field: &FieldInfo) -> String {
    field.docs.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// The JSON schema of the config file, for editors.
pub fn schema() -> String {
    let mut schema = Config::schema();
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    schema["title"] = json!("qwen-lora config");
    format!("{schema:#}\n")
}
