//! What a config value can be: reading with one clear error, writing, and describing itself for the reference page.
//!
//! `section!` declares a section of the file once: struct, documentation, defaults and ranges together. The
//! documentation of a field is its doc comment; `docs/config.md` and the JSON schema are made from it.

use crate::config::tree::{Content, Node, Place};
use crate::error::{Error, Result, nearest};
use serde_json::{Value as Json, json};
use std::fmt;
use std::path::{Path, PathBuf};

/// A value of the config file.
pub trait Field: Sized {
    /// What is expected, in words, such as "a whole number".
    fn kind() -> String;
    /// JSON schema of the value.
    fn schema() -> Json;
    /// Reads the value. Errors: wrong type or range, with key, place, found and expected.
    fn read(node: &Node, at: &At) -> Result<Self>;
    /// The value as a tree; reading it back gives the same value.
    fn write(&self) -> Node;
    /// The fields inside, if this is a section.
    fn fields() -> Vec<FieldInfo> {
        Vec::new()
    }
}

/// A field as the reference page shows it.
pub struct FieldInfo {
    /// The key.
    pub name: &'static str,
    /// Lines of the doc comment.
    pub docs: &'static [&'static str],
    /// What is expected, with the range.
    pub kind: String,
    /// The default; `None` if the file must give the key.
    pub default: Option<Node>,
    /// JSON schema, with the range.
    pub schema: Json,
    /// The fields inside, if this is a section.
    pub fields: Vec<FieldInfo>,
}

/// Where a value stands: file and dotted key. Makes the errors.
pub struct At<'a> {
    file: &'a Path,
    key: String,
}

impl<'a> At<'a> {
    /// The root of `file`.
    pub fn root(file: &'a Path) -> Self {
        Self { file, key: String::new() }
    }

    /// The entry `name` of this value.
    pub fn child(&self, name: impl fmt::Display) -> Self {
        let key = if self.key.is_empty() { name.to_string() } else { format!("{}.{name}", self.key) };
        Self { file: self.file, key }
    }

    /// The dotted key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// "in `a.yaml`".
    fn file(&self) -> String {
        format!("in `{}`", self.file.display())
    }

    /// "in `a.yaml`, line 3, column 7", or the `--set` that the value came from.
    pub fn place(&self, place: &Place) -> String {
        match place {
            Place::File { .. } => format!("{}, {place}", self.file()),
            Place::Set(_) => format!("in {place}"),
            Place::Made => self.file(),
        }
    }

    /// The value at `node` is not what was expected.
    pub fn unexpected(&self, node: &Node, expected: impl fmt::Display) -> Error {
        let what = if self.key.is_empty() { "the config file".into() } else { format!("`{}`", self.key) };
        let error = Error::usage(format!("wrong value for {what} {}", self.place(&node.place)))
            .expected(expected, node.found());
        match &node.content {
            Content::Text(t) if t.contains("${") => error.hint("variables are not expanded in the config file"),
            _ => error,
        }
    }
}

/// A range of numbers, for messages, checks and the schema.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    min: f64,
    max: f64,
    min_is_outside: bool,
}

impl Range {
    /// `min` or more.
    pub const fn at_least(min: f64) -> Self {
        Self { min, max: f64::INFINITY, min_is_outside: false }
    }

    /// More than `min`.
    pub const fn above(min: f64) -> Self {
        Self { min, max: f64::INFINITY, min_is_outside: true }
    }

    /// From `min` to `max`, both included.
    pub const fn between(min: f64, max: f64) -> Self {
        Self { min, max, min_is_outside: false }
    }

    /// Whether `x` lies inside.
    pub fn contains(&self, x: f64) -> bool {
        x.is_finite() && x <= self.max && if self.min_is_outside { x > self.min } else { x >= self.min }
    }

    /// Adds the bounds to a JSON schema of a number.
    pub fn add_to_schema(&self, schema: &mut Json) {
        let number = |x: f64| if x.fract() == 0.0 { json!(x as i64) } else { json!(x) };
        schema[if self.min_is_outside { "exclusiveMinimum" } else { "minimum" }] = number(self.min);
        if self.max.is_finite() {
            schema["maximum"] = number(self.max);
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.min_is_outside, self.max.is_finite()) {
            (true, false) => write!(f, "above {}", self.min),
            (false, false) => write!(f, "of {} or more", self.min),
            (true, true) => write!(f, "above {} and up to {}", self.min, self.max),
            (false, true) => write!(f, "from {} to {}", self.min, self.max),
        }
    }
}

/// A number, which can have a range.
pub trait Number: Field {
    /// The value for comparisons.
    fn as_f64(&self) -> f64;

    /// Reads the value and checks its range.
    fn read_within(node: &Node, at: &At, range: Range) -> Result<Self> {
        let expected = || format!("{} {range}", Self::kind());
        match &node.content {
            Content::Int(_) | Content::Float(_) => match Self::read(node, at) {
                Ok(value) if range.contains(value.as_f64()) => Ok(value),
                _ => Err(at.unexpected(node, expected())),
            },
            _ => Err(at.unexpected(node, expected())),
        }
    }
}

macro_rules! whole_number {
    ($($ty:ty),*) => {$(
        impl Field for $ty {
            fn kind() -> String {
                "a whole number".into()
            }
            fn schema() -> Json {
                json!({"type": "integer"})
            }
            fn read(node: &Node, at: &At) -> Result<Self> {
                match node.content {
                    Content::Int(i) => <$ty>::try_from(i).ok(),
                    _ => None,
                }
                .ok_or_else(|| at.unexpected(node, Self::kind()))
            }
            fn write(&self) -> Node {
                Node::made(Content::Int(*self as i128))
            }
        }
        impl Number for $ty {
            fn as_f64(&self) -> f64 {
                *self as f64
            }
        }
    )*};
}
whole_number!(usize, u64);

impl Field for f64 {
    fn kind() -> String {
        "a number".into()
    }
    fn schema() -> Json {
        json!({"type": "number"})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match node.content {
            Content::Int(i) => Ok(i as f64),
            Content::Float(f) if f.is_finite() => Ok(f),
            _ => Err(at.unexpected(node, Self::kind())),
        }
    }
    fn write(&self) -> Node {
        Node::made(Content::Float(*self))
    }
}

impl Number for f64 {
    fn as_f64(&self) -> f64 {
        *self
    }
}

impl Field for bool {
    fn kind() -> String {
        "true or false".into()
    }
    fn schema() -> Json {
        json!({"type": "boolean"})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match node.content {
            Content::Bool(b) => Ok(b),
            _ => Err(at.unexpected(node, Self::kind())),
        }
    }
    fn write(&self) -> Node {
        Node::made(Content::Bool(*self))
    }
}

impl Field for String {
    fn kind() -> String {
        "text".into()
    }
    fn schema() -> Json {
        json!({"type": "string"})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match &node.content {
            Content::Text(t) => Ok(t.clone()),
            Content::Bool(_) | Content::Int(_) | Content::Float(_) => {
                Err(at.unexpected(node, Self::kind()).hint("put the value in quotes"))
            }
            _ => Err(at.unexpected(node, Self::kind())),
        }
    }
    fn write(&self) -> Node {
        Node::text(self)
    }
}

impl Field for PathBuf {
    fn kind() -> String {
        "a path".into()
    }
    fn schema() -> Json {
        String::schema()
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match String::read(node, at)? {
            text if text.is_empty() => Err(at.unexpected(node, Self::kind())),
            text => Ok(text.into()),
        }
    }
    fn write(&self) -> Node {
        // Paths come from text (the file, an override) or from tests: there is nothing to lose.
        Node::text(self.to_string_lossy())
    }
}

/// `null` stands for absence.
impl<T: Field> Field for Option<T> {
    fn kind() -> String {
        format!("{} or null", T::kind())
    }
    fn schema() -> Json {
        json!({"anyOf": [T::schema(), {"type": "null"}]})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match node.content {
            Content::Null => Ok(None),
            // The inner error does not know that null would do as well.
            _ if T::fields().is_empty() => T::read(node, at).map(Some).map_err(|_| at.unexpected(node, Self::kind())),
            _ => T::read(node, at).map(Some),
        }
    }
    fn write(&self) -> Node {
        self.as_ref().map_or(Node::made(Content::Null), T::write)
    }
}

impl<T: Field> Field for Vec<T> {
    fn kind() -> String {
        format!("a list, each entry {}", T::kind())
    }
    fn schema() -> Json {
        json!({"type": "array", "items": T::schema()})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match &node.content {
            Content::List(list) => list.iter().enumerate().map(|(i, entry)| T::read(entry, &at.child(i))).collect(),
            _ => Err(at.unexpected(node, Self::kind())),
        }
    }
    fn write(&self) -> Node {
        Node::made(Content::List(self.iter().map(Field::write).collect()))
    }
}

/// Fails for a key of the mapping `node` that is not in `known`, and names the nearest one, or the sections of the
/// file that do know it.
pub fn check_keys(node: &Node, at: &At, known: &[&'static str]) -> Result<()> {
    let Content::Map(entries) = &node.content else { return Ok(()) };
    let Some((key, _)) = entries.iter().find(|(key, _)| !known.contains(&key.name.as_str())) else { return Ok(()) };
    let path = at.child(&key.name).key;
    let error = Error::usage(format!("unknown key `{path}` {}", at.place(&key.place)));
    let elsewhere: Vec<String> = crate::config::reference::keys()
        .into_iter()
        .filter(|k| k.rsplit('.').next() == Some(&key.name) && *k != path)
        .map(|k| format!("`{k}`"))
        .collect();
    Err(if let Some(near) = nearest(&key.name, known.iter().copied()) {
        error.detail(format!("the nearest known key is `{}`", at.child(near).key))
    } else if !elsewhere.is_empty() {
        error.detail(format!("a key of this name stands elsewhere: {}", elsewhere.join(", ")))
    } else {
        error.detail(format!("known here: {}", known.join(", ")))
    })
}

/// The error for a key that the file must give, or for the first such key inside a section that is not there.
pub fn missing<T: Field>(node: &Node, at: &At) -> Error {
    if !T::fields().is_empty() {
        let empty = Node { content: Content::Map(Vec::new()), place: node.place.clone() };
        if let Err(error) = T::read(&empty, at) {
            return error;
        }
    }
    Error::usage(format!("`{}` is missing {}", at.key, at.file()))
        .detail(format!("expected {}; this key has no default", T::kind()))
}

/// Declares an enum that is written as one of a few words.
macro_rules! choice {
    ($(#[doc = $doc:literal])* pub enum $name:ident {
        $(#[doc = $vdoc:literal] $variant:ident = $word:literal,)*
    }) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $(#[doc = $vdoc] $variant,)*
        }

        impl $name {
            /// The word that stands for it in the config file.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl $crate::config::field::Field for $name {
            fn kind() -> String {
                [$(concat!("`", $word, "`")),*].join(" or ")
            }
            fn schema() -> serde_json::Value {
                serde_json::json!({"enum": [$($word),*]})
            }
            fn read(
                node: &$crate::config::tree::Node,
                at: &$crate::config::field::At,
            ) -> $crate::error::Result<Self> {
                let word = match &node.content {
                    $crate::config::tree::Content::Text(text) => text.as_str(),
                    // `none` is a word here; an empty value is not.
                    _ => return Err(at.unexpected(node, Self::kind())),
                };
                match word {
                    $($word => Ok(Self::$variant),)*
                    _ => {
                        let error = at.unexpected(node, Self::kind());
                        Err(match $crate::error::nearest(word, [$($word),*]) {
                            Some(near) => error.hint(format!("did you mean `{near}`?")),
                            None => error,
                        })
                    }
                }
            }
            fn write(&self) -> $crate::config::tree::Node {
                $crate::config::tree::Node::text(self.as_str())
            }
        }
    };
}

/// Declares a section of the config file: a struct whose every field has its documentation, its default (the
/// file must give a key that has none; `Default` then leaves it empty) and, for numbers, its range. `shorthand KEY` lets a plain text stand for `{KEY: text}`.
macro_rules! section {
    (@default) => { Default::default() };
    (@default $default:expr) => { $default };
    (@info $ty:ty) => { None };
    (@info $ty:ty, $default:expr) => {{
        let default: $ty = $default;
        Some($crate::config::field::Field::write(&default))
    }};
    (@absent $ty:ty, $node:ident, $at:expr) => {
        return Err($crate::config::field::missing::<$ty>($node, &$at))
    };
    (@absent $ty:ty, $node:ident, $at:expr, $default:expr) => { $default };
    (@read $ty:ty, $node:expr, $at:expr, ) => { <$ty as $crate::config::field::Field>::read($node, $at)? };
    (@read $ty:ty, $node:expr, $at:expr, $range:expr) => {
        <$ty as $crate::config::field::Number>::read_within($node, $at, $range)?
    };
    ($(#[doc = $doc:literal])* pub struct $name:ident $(shorthand $shorthand:ident)? {
        $($(#[doc = $fdoc:literal])* $field:ident: $ty:ty $(= $default:expr)? $(, $range:expr)?;)*
    }) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name {
            $($(#[doc = $fdoc])* pub $field: $ty,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $crate::config::field::section!(@default $($default)?),)* }
            }
        }

        impl $crate::config::field::Field for $name {
            fn kind() -> String {
                let kind = "a map".to_string();
                $(let kind = format!("text (its `{}`) or {kind}", stringify!($shorthand));)?
                kind
            }
            fn schema() -> serde_json::Value {
                let fields = <Self as $crate::config::field::Field>::fields();
                let schema = $crate::config::field::section_schema(&fields);
                $(let schema = {
                    let _ = stringify!($shorthand);
                    serde_json::json!({"anyOf": [{"type": "string"}, schema]})
                };)?
                schema
            }
            fn read(
                node: &$crate::config::tree::Node,
                at: &$crate::config::field::At,
            ) -> $crate::error::Result<Self> {
                #[allow(unused_imports)]
                use $crate::config::tree::{Content, Node};
                $(
                    let whole;
                    let node = match &node.content {
                        Content::Text(_) => {
                            whole = Node {
                                content: Node::map([(stringify!($shorthand), node.clone())]).content,
                                place: node.place.clone(),
                            };
                            &whole
                        }
                        _ => node,
                    };
                )?
                // A section whose every line is commented out.
                if !matches!(node.content, Content::Map(_) | Content::Null) {
                    return Err(at.unexpected(node, Self::kind()));
                }
                $crate::config::field::check_keys(node, at, &[$(stringify!($field)),*])?;
                Ok(Self {
                    $($field: match node.get(stringify!($field)) {
                        Some(value) => $crate::config::field::section!(@read $ty, value, &at.child(stringify!($field)), $($range)?),
                        None => $crate::config::field::section!(@absent $ty, node, at.child(stringify!($field)) $(, $default)?),
                    },)*
                })
            }
            fn write(&self) -> $crate::config::tree::Node {
                $crate::config::tree::Node::map([
                    $((stringify!($field), $crate::config::field::Field::write(&self.$field)),)*
                ])
            }
            fn fields() -> Vec<$crate::config::field::FieldInfo> {
                vec![$({
                    #[allow(unused_mut)]
                    let mut info = $crate::config::field::FieldInfo {
                        name: stringify!($field),
                        docs: &[$($fdoc),*],
                        kind: <$ty as $crate::config::field::Field>::kind(),
                        default: $crate::config::field::section!(@info $ty $(, $default)?),
                        schema: <$ty as $crate::config::field::Field>::schema(),
                        fields: <$ty as $crate::config::field::Field>::fields(),
                    };
                    $(
                        let range: $crate::config::field::Range = $range;
                        info.kind = format!("{} {range}", info.kind);
                        range.add_to_schema(&mut info.schema);
                    )?
                    info
                }),*]
            }
        }
    };
}

pub(crate) use {choice, section};

/// The JSON schema of a section.
pub fn section_schema(fields: &[FieldInfo]) -> Json {
    let mut properties = serde_json::Map::new();
    for field in fields {
        let mut schema = field.schema.clone();
        let docs: Vec<&str> = field.docs.iter().map(|line| line.trim()).collect();
        schema["description"] = docs.join(" ").into();
        if let Some(default) = field.default.as_ref().filter(|_| field.fields.is_empty()) {
            schema["default"] = serde_json::to_value(default).expect("a config value is plain JSON");
        }
        properties.insert(field.name.into(), schema);
    }
    let required: Vec<&str> = fields.iter().filter(|f| f.default.is_none()).map(|f| f.name).collect();
    let mut schema = json!({"type": "object", "additionalProperties": false, "properties": properties});
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}
