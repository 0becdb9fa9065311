//! Typed reading of the JSON config files that lie beside published weights. Every error names file, key, what was
//! expected and what was found.

use crate::error::{Error, Result, nearest};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// A JSON object from a file, or an object inside it.
pub struct JsonObject {
    path: PathBuf,
    /// Keys that lead here from the top of the file, each followed by a dot.
    prefix: String,
    entries: Map<String, Value>,
}

/// A type that a config value can have.
pub trait Field: Sized {
    /// What the value should be, for the error message.
    const EXPECTED: &str;

    /// The value, if it is of this type.
    fn read(value: &Value) -> Option<Self>;
}

impl JsonObject {
    /// Reads `path`, whose content must be one JSON object.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e).into_usage())?;
        Self::parse(path, &text)
    }

    /// The object written in `text`; `path` is where it came from, for the error messages.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).map_err(|e| {
            Error::usage(format!("`{}` is not valid JSON", path.display()))
                .detail(e.to_string())
                .hint("download or copy the file again")
        })?;
        match value {
            Value::Object(entries) => Ok(Self { path: path.into(), prefix: String::new(), entries }),
            other => Err(Error::usage(format!("`{}` is not a config file", path.display()))
                .expected("a JSON object", describe(&other))),
        }
    }

    /// The file that this object comes from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The object under `key`; `None` if the key is absent or null.
    pub fn section(&self, key: &str) -> Result<Option<Self>> {
        match self.entries.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(entries)) => Ok(Some(Self {
                path: self.path.clone(),
                prefix: format!("{}{key}.", self.prefix),
                entries: entries.clone(),
            })),
            Some(other) => Err(self.bad_value(key, "an object", describe(other))),
        }
    }

    /// Whether there is a value under `key` that is not null.
    pub fn has(&self, key: &str) -> bool {
        !matches!(self.entries.get(key), None | Some(Value::Null))
    }

    /// Keys and values, in key order.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// The value under `key`. Errors: absent, or of another type.
    pub fn get<T: Field>(&self, key: &str) -> Result<T> {
        match self.optional(key)? {
            Some(value) => Ok(value),
            None => {
                let mut error =
                    Error::usage(format!("key `{}{key}` is missing in `{}`", self.prefix, self.path.display()))
                        .detail(format!("expected {}", T::EXPECTED));
                if let Some(near) = nearest(key, self.entries.keys().map(String::as_str)) {
                    error = error.detail(format!("the nearest key there is `{near}`"));
                }
                Err(error)
            }
        }
    }

    /// The value under `key`, or `default` if the key is absent or null. Errors: of another type.
    pub fn get_or<T: Field>(&self, key: &str, default: T) -> Result<T> {
        Ok(self.optional(key)?.unwrap_or(default))
    }

    /// The value under `key`, if the key is there and not null. Errors: of another type.
    pub fn optional<T: Field>(&self, key: &str) -> Result<Option<T>> {
        match self.entries.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match T::read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(self.bad_value(key, T::EXPECTED, describe(value))),
            },
        }
    }

    /// The error for a value under `key` that cannot be used.
    pub fn bad_value(&self, key: &str, expected: impl std::fmt::Display, found: impl std::fmt::Display) -> Error {
        Error::usage(format!("bad value of `{}{key}` in `{}`", self.prefix, self.path.display()))
            .expected(expected, found)
    }
}

/// A JSON value for an error message, cut to one short line.
fn describe(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}

impl Field for usize {
    const EXPECTED: &str = "a whole number, zero or more";
    fn read(value: &Value) -> Option<Self> {
        value.as_u64().and_then(|v| v.try_into().ok())
    }
}

impl Field for f64 {
    const EXPECTED: &str = "a number";
    fn read(value: &Value) -> Option<Self> {
        value.as_f64()
    }
}

impl Field for bool {
    const EXPECTED: &str = "true or false";
    fn read(value: &Value) -> Option<Self> {
        value.as_bool()
    }
}

impl Field for String {
    const EXPECTED: &str = "a string";
    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(Self::from)
    }
}

/// Lists of one type.
macro_rules! list_field {
    ($($element:ty: $expected:literal),*) => {$(
        impl Field for Vec<$element> {
            const EXPECTED: &str = $expected;
            fn read(value: &Value) -> Option<Self> {
                value.as_array()?.iter().map(<$element>::read).collect()
            }
        }
    )*};
}
list_field!(usize: "a list of whole numbers", f64: "a list of numbers", bool: "a list of true or false", String: "a list of strings");

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> JsonObject {
        JsonObject::parse(Path::new("dir/config.json"), text).unwrap()
    }

    #[test]
    fn errors_name_file_key_expected_and_found() {
        let config = object(r#"{"num_layers": "two", "text_config": {"hidden_siz": 3, "mean": [1, "x"]}}"#);
        let error = config.get::<usize>("num_layers").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert_eq!(
            error.to_string(),
            "bad value of `num_layers` in `dir/config.json`\n  expected a whole number, zero or more, found \"two\""
        );
        let inner = config.section("text_config").unwrap().unwrap();
        assert_eq!(
            inner.get::<usize>("hidden_size").unwrap_err().to_string(),
            "key `text_config.hidden_size` is missing in `dir/config.json`\n  expected a whole number, zero or more\n  \
             the nearest key there is `hidden_siz`"
        );
        assert!(inner.get::<Vec<f64>>("mean").unwrap_err().to_string().contains("found [1,\"x\"]"));
        assert!(config.section("num_layers").is_err());
        for (text, word) in [("", "not valid JSON"), ("[1]", "expected a JSON object, found [1]")] {
            let error = JsonObject::parse(Path::new("c.json"), text).err().expect("refused").to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn null_is_absent() {
        let config = object(r#"{"shift_terminal": null}"#);
        assert_eq!(config.optional::<f64>("shift_terminal").unwrap(), None);
        assert_eq!(config.get_or("other", 3usize).unwrap(), 3);
        assert!(!config.has("shift_terminal"));
    }
}
