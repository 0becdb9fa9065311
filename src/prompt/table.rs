//! Prompts in parts from a table: a YAML list, or CSV with a column for each part.

use crate::config::field::{At, Field};
use crate::config::tree;
use crate::error::{Error, Result, nearest};
use crate::prompt::structured::Parts;
use std::path::Path;

/// Columns of a CSV table. `detail` and `english` hold several entries between semicolons, or stand several times.
const COLUMNS: [&str; 8] = ["subject", "style", "detail", "english", "quality", "anatomy", "negative", "recipe_style"];

/// Reads a table: CSV if the name ends in `.csv`, else YAML.
///
/// Errors (usage): unreadable, not UTF-8, unknown column or key, a row without subject, no row.
pub fn read(path: &Path) -> Result<Vec<Parts>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read the prompts", path, e).into_usage())?;
    let is_csv = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv"));
    let text = text.trim_start_matches('\u{feff}');
    let rows = if is_csv { read_csv(text, path)? } else { read_yaml(text, path)? };
    if rows.is_empty() {
        return Err(Error::usage(format!("`{}` holds no prompt", path.display())));
    }
    for (i, row) in rows.iter().enumerate() {
        row.check().map_err(|e| e.detail(format!("in row {} of `{}`", i + 1, path.display())))?;
    }
    Ok(rows)
}

fn read_yaml(text: &str, path: &Path) -> Result<Vec<Parts>> {
    let root = tree::parse(text, &format!("`{}` is not a valid table of prompts", path.display()))?;
    Vec::<Parts>::read(&root, &At::root(path))
}

fn read_csv(text: &str, path: &Path) -> Result<Vec<Parts>> {
    let fault = |e: csv::Error| {
        Error::usage(format!("`{}` is not a valid table of prompts", path.display())).detail(e.to_string())
    };
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.as_bytes());
    let columns: Vec<String> = reader.headers().map_err(fault)?.iter().map(str::to_lowercase).collect();
    if let Some(unknown) = columns.iter().find(|c| !COLUMNS.contains(&c.as_str())) {
        let error = Error::usage(format!("unknown column `{unknown}` in `{}`", path.display()));
        return Err(match nearest(unknown, COLUMNS) {
            Some(near) => error.detail(format!("the nearest known column is `{near}`")),
            None => error.detail(format!("known: {}", COLUMNS.join(", "))),
        });
    }
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(fault)?;
        let mut parts = Parts::default();
        for (column, value) in columns.iter().zip(&record).filter(|(_, value)| !value.is_empty()) {
            let own = || Some(value.to_string());
            let list = value.split([';', '；']).map(|entry| entry.trim().to_string());
            match column.as_str() {
                "subject" => parts.subject = value.into(),
                "style" => parts.style = own(),
                "detail" => parts.detail.extend(list),
                "english" => parts.english.extend(list),
                "quality" => parts.quality = own(),
                "anatomy" => parts.anatomy = own(),
                "negative" => parts.negative = own(),
                _ => {
                    parts.recipe_style = value.parse().map_err(|_| {
                        Error::usage(format!(
                            "wrong value for `recipe_style` in row {} of `{}`",
                            rows.len() + 1,
                            path.display()
                        ))
                        .expected("true or false", format!("`{value}`"))
                    })?
                }
            }
        }
        rows.push(parts);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str, text: &str) -> Result<Vec<Parts>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn csv_and_yaml_say_the_same() {
        let csv = "\u{feff}Subject,style,detail,detail,english\n女孩,赛博朋克,蓝色长发；机械左臂,,sharp focus\n\"a cat, big\",,,red hat,\n";
        let yaml = "- {subject: 女孩, style: 赛博朋克, detail: [蓝色长发, 机械左臂], english: [sharp focus]}\n- {subject: 'a cat, big', detail: [red hat]}\n";
        assert_eq!(table("t.csv", csv).unwrap(), table("t.yaml", yaml).unwrap());
        for (name, text, why) in [
            ("t.csv", "subjct\n女孩\n", "the nearest known column is `subject`"),
            ("t.csv", "subject,style\n女孩\n", "is not a valid table"),
            ("t.csv", "subject,style\n,水墨\n", "in row 1"),
            ("t.csv", "subject\n", "holds no prompt"),
            ("t.csv", "subject,recipe_style\n女孩,maybe\n", "true or false"),
            ("t.yaml", "- {subjct: 女孩}\n", "`0.subject`"),
            ("t.yaml", "[]", "holds no prompt"),
        ] {
            let error = table(name, text).unwrap_err();
            assert!(error.to_string().contains(why) && error.exit_code() == 2, "{text}: {error}");
        }
    }
}
