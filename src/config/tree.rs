//! A YAML document as a tree whose nodes remember where they were written, and `--set` overrides on that tree.
//!
//! The config is read from this tree rather than straight into structs, so that an override, a wrong type and a
//! value out of range are all reported with the same words and the same place.

use crate::error::{Error, Result};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_saphyr::{FlowSeq, Spanned};
use std::fmt;

/// A value and the place it was written at.
#[derive(Clone, Debug)]
pub struct Node {
    /// The value.
    pub content: Content,
    /// Where it stands.
    pub place: Place,
}

/// What a node holds.
#[derive(Clone, Debug)]
pub enum Content {
    /// `null`, `~` or nothing.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i128),
    /// A number with a fraction or an exponent.
    Float(f64),
    /// Text.
    Text(String),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping, in the order of the file.
    Map(Vec<(Key, Node)>),
}

/// A key of a mapping and the place it was written at.
#[derive(Clone, Debug)]
pub struct Key {
    /// The key.
    pub name: String,
    /// Where it stands.
    pub place: Place,
}

/// Where something was written.
#[derive(Clone, Debug)]
pub enum Place {
    /// In the file, counted from 1.
    File {
        /// Line.
        line: u64,
        /// Column, in characters.
        column: u64,
    },
    /// In this `--set` argument.
    Set(String),
    /// Nowhere: filled in by the program.
    Made,
}

/// Equality of values; places do not count.
impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        match (&self.content, &other.content) {
            (Content::Null, Content::Null) => true,
            (Content::Bool(a), Content::Bool(b)) => a == b,
            (Content::Int(a), Content::Int(b)) => a == b,
            (Content::Float(a), Content::Float(b)) => a == b,
            (Content::Text(a), Content::Text(b)) => a == b,
            (Content::List(a), Content::List(b)) => a == b,
            (Content::Map(a), Content::Map(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|((ka, va), (kb, vb))| ka.name == kb.name && va == vb)
            }
            _ => false,
        }
    }
}

impl Node {
    /// A node that the program made.
    pub fn made(content: Content) -> Self {
        Self { content, place: Place::Made }
    }

    /// A text node that the program made.
    pub fn text(text: impl Into<String>) -> Self {
        Self::made(Content::Text(text.into()))
    }

    /// A mapping that the program made.
    pub fn map(entries: impl IntoIterator<Item = (&'static str, Node)>) -> Self {
        let key = |name: &str| Key { name: name.into(), place: Place::Made };
        Self::made(Content::Map(entries.into_iter().map(|(name, node)| (key(name), node)).collect()))
    }

    /// The node of `key`, if this is a mapping that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.content {
            Content::Map(entries) => entries.iter().find(|(k, _)| k.name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// [`Node::get`], to change it.
    pub fn get_mut(&mut self, key: &str) -> Option<&mut Node> {
        match &mut self.content {
            Content::Map(entries) => entries.iter_mut().find(|(k, _)| k.name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// Takes `key` out of a mapping. Does nothing to other nodes.
    pub fn remove(&mut self, key: &str) {
        if let Content::Map(entries) = &mut self.content {
            entries.retain(|(k, _)| k.name != key);
        }
    }

    /// Sets `key` of a mapping, in place of the old value or at the end. Does nothing to other nodes.
    pub fn insert(&mut self, key: &str, place: Place, value: Node) {
        if let Content::Map(entries) = &mut self.content {
            match entries.iter_mut().find(|(k, _)| k.name == key) {
                Some((_, node)) => *node = value,
                None => entries.push((Key { name: key.into(), place }, value)),
            }
        }
    }

    /// The value in words, for an error message.
    pub fn found(&self) -> String {
        match &self.content {
            Content::Null => "nothing".into(),
            Content::Bool(b) => b.to_string(),
            Content::Int(i) => i.to_string(),
            Content::Float(f) => format!("{f:?}"),
            Content::Text(t) => format!("the text `{t}`"),
            Content::List(l) => format!("a list of {}", l.len()),
            Content::Map(m) if m.is_empty() => "an empty map".into(),
            Content::Map(m) => {
                format!("a map of {}", m.iter().map(|(k, _)| format!("`{}`", k.name)).collect::<Vec<_>>().join(", "))
            }
        }
    }

    /// The value as one line of YAML, for the reference page and for lists of differences.
    pub fn inline(&self) -> String {
        match &self.content {
            Content::Null => "null".into(),
            Content::Text(t) => match parse(t, "").map(|node| node.content) {
                Ok(Content::Text(plain)) if plain == *t => plain,
                _ => format!("{t:?}"),
            },
            Content::List(l) => format!("[{}]", l.iter().map(Node::inline).collect::<Vec<_>>().join(", ")),
            Content::Map(m) => {
                let entries: Vec<_> = m.iter().map(|(k, v)| format!("{}: {}", k.name, v.inline())).collect();
                format!("{{{}}}", entries.join(", "))
            }
            _ => self.found(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { line, column } => write!(f, "line {line}, column {column}"),
            Self::Set(argument) => write!(f, "`--set {argument}`"),
            Self::Made => write!(f, "the defaults"),
        }
    }
}

/// Parses one YAML document; `fault` starts the error, such as "`a.yaml` is not a valid config file".
///
/// Errors: not YAML, a key twice in one mapping, several documents; each with line and column.
pub fn parse(text: &str, fault: &str) -> Result<Node> {
    let options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
    serde_saphyr::from_str_with_options::<Option<Node>>(text, options)
        .map(|node| node.unwrap_or(Node::made(Content::Null)))
        .map_err(|e| {
            let place = e.location().map(|l| format!(", line {}, column {}", l.line(), l.column()));
            Error::usage(format!("{fault}{}", place.unwrap_or_default()))
                .detail(without_place(&e.render_with_formatter(&serde_saphyr::UserMessageFormatter)))
        })
}

/// The parser's message without the place that it repeats at the end.
fn without_place(message: &str) -> &str {
    message.rfind(" at line ").map_or(message, |end| &message[..end])
}

/// Applies `key.path=value` to the tree: makes the sections on the way that are not there yet, and takes list
/// entries by their index. `shorthand` names the key under which a text that stands for a mapping is kept, by path.
///
/// Errors: no `=`, an index outside its list, a path that leads through a value.
pub fn set(root: &mut Node, argument: &str, shorthand: impl Fn(&str) -> Option<&'static str>) -> Result<()> {
    let place = || Place::Set(argument.to_string());
    let (path, value) = argument.split_once('=').ok_or_else(|| {
        Error::usage(format!("cannot read `--set {argument}`"))
            .expected("key=value", "no `=`")
            .hint("write for example `--set training.max_steps=10`")
    })?;
    let mut value = parse(value, &format!("the value of `--set {argument}` is not valid YAML"))?;
    move_to(&mut value, &place());

    let mut node = root;
    let mut walked = String::new();
    for step in path.trim().split('.') {
        if step.is_empty() {
            return Err(Error::usage(format!("cannot read `--set {argument}`")).detail("a part of the key is empty"));
        }
        if let (Content::Text(_), Some(key)) = (&node.content, shorthand(&walked)) {
            let text = std::mem::replace(node, Node::map([]));
            node.insert(key, Place::Made, text);
        }
        if matches!(node.content, Content::Null) {
            *node = Node { content: Content::Map(Vec::new()), place: place() };
        }
        let found = node.found();
        node = match &mut node.content {
            Content::Map(entries) => {
                let index = entries.iter().position(|(k, _)| k.name == step).unwrap_or_else(|| {
                    let key = Key { name: step.into(), place: place() };
                    entries.push((key, Node { content: Content::Null, place: place() }));
                    entries.len() - 1
                });
                &mut entries[index].1
            }
            Content::List(list) => {
                let len = list.len();
                step.parse::<usize>().ok().and_then(|i| list.get_mut(i)).ok_or_else(|| {
                    Error::usage(format!("cannot apply `--set {argument}`"))
                        .expected(format!("an index below {len} into the list `{walked}`"), format!("`{step}`"))
                })?
            }
            _ => {
                return Err(Error::usage(format!("cannot apply `--set {argument}`"))
                    .detail(format!("`{walked}` is {found}: it has no key `{step}`")));
            }
        };
        walked = if walked.is_empty() { step.to_string() } else { format!("{walked}.{step}") };
    }
    *node = value;
    Ok(())
}

fn move_to(node: &mut Node, place: &Place) {
    node.place = place.clone();
    match &mut node.content {
        Content::List(list) => list.iter_mut().for_each(|n| move_to(n, place)),
        Content::Map(entries) => entries.iter_mut().for_each(|(key, n)| {
            key.place = place.clone();
            move_to(n, place);
        }),
        _ => {}
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned { value, referenced, .. } = Spanned::<Content>::deserialize(deserializer)?;
        Ok(Self { content: value, place: Place::File { line: referenced.line(), column: referenced.column() } })
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }
    fn visit_none<E>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        Content::deserialize(deserializer)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Content, E> {
        Ok(Content::Bool(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Content, E> {
        Ok(Content::Int(value.into()))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Content, E> {
        Ok(Content::Int(value.into()))
    }
    fn visit_i128<E>(self, value: i128) -> Result<Content, E> {
        Ok(Content::Int(value))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Content, E> {
        Ok(Content::Float(value))
    }
    fn visit_str<E>(self, value: &str) -> Result<Content, E> {
        Ok(Content::Text(value.into()))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
        let mut list = Vec::new();
        while let Some(node) = seq.next_element()? {
            list.push(node);
        }
        Ok(Content::List(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
        let mut entries = Vec::new();
        while let Some(Spanned { value, referenced, .. }) = map.next_key::<Spanned<String>>()? {
            let place = Place::File { line: referenced.line(), column: referenced.column() };
            entries.push((Key { name: value, place }, map.next_value()?));
        }
        Ok(Content::Map(entries))
    }
}

impl Serialize for Node {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let is_scalar = |node: &Node| !matches!(node.content, Content::List(_) | Content::Map(_));
        match &self.content {
            Content::Null => serializer.serialize_unit(),
            Content::Bool(b) => serializer.serialize_bool(*b),
            Content::Int(i) => match (i64::try_from(*i), u64::try_from(*i)) {
                (Ok(i), _) => serializer.serialize_i64(i),
                (_, Ok(u)) => serializer.serialize_u64(u),
                _ => serializer.serialize_i128(*i),
            },
            Content::Float(f) => serializer.serialize_f64(*f),
            Content::Text(t) => serializer.serialize_str(t),
            Content::List(list) if list.iter().all(is_scalar) => FlowSeq(Items(list)).serialize(serializer),
            Content::List(list) => Items(list).serialize(serializer),
            Content::Map(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for (key, node) in entries {
                    map.serialize_entry(&key.name, node)?;
                }
                map.end()
            }
        }
    }
}

struct Items<'a>(&'a [Node]);

impl Serialize for Items<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut seq = serializer.serialize_seq(Some(self.0.len()))?;
        for node in self.0 {
            seq.serialize_element(node)?;
        }
        seq.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(text: &str) -> Node {
        parse(text, "cannot read").unwrap()
    }

    #[test]
    fn values_keep_type_and_place() {
        let root = tree("a: {b: 1e-5, c: [1, no, 'x']}\nd: 18446744073709551615\ne:\n");
        let a = root.get("a").unwrap();
        assert_eq!(a.get("b").unwrap().as_float(), 1e-5);
        assert_eq!(a.get("b").unwrap().place.to_string(), "line 1, column 8");
        assert_eq!(a.get("c").unwrap().inline(), "[1, no, x]");
        assert_eq!(root.get("d").unwrap().inline(), "18446744073709551615");
        assert!(matches!(root.get("e").unwrap().content, Content::Null));
    }

    impl Node {
        fn as_float(&self) -> f64 {
            match self.content {
                Content::Float(f) => f,
                _ => panic!("{self:?} is not a float"),
            }
        }
    }

    #[test]
    fn a_key_given_twice_is_refused_with_its_place() {
        let error = parse("a: 1\nb: 2\na: 3\n", "cannot read `a.yaml`").unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("cannot read `a.yaml`, line 3, column 1\n  duplicate mapping key `a`"), "{text}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn overrides_reach_sections_lists_and_shorthands() {
        let mut root = tree("model: m\nlist: [x, y]\ntraining: {steps: 5}\n");
        let shorthand = |path: &str| (path == "model").then_some("path");
        for argument in
            ["training.steps=10", "lora.rank=4", "list.1=z", "model.dtype=bf16", "data.range=[1, 2]", "text=a=b: c"]
        {
            set(&mut root, argument, shorthand).unwrap();
        }
        assert_eq!(
            root.inline(),
            "{model: {path: m, dtype: bf16}, list: [x, z], training: {steps: 10}, lora: {rank: 4}, \
             data: {range: [1, 2]}, text: {a=b: c}}"
        );
        assert_eq!(root.get("lora").unwrap().get("rank").unwrap().place.to_string(), "`--set lora.rank=4`");
        for (argument, says) in [
            ("training.steps", "no `=`"),
            ("list.2=z", "an index below 2 into the list `list`, found `2`"),
            ("training.steps.more=1", "`training.steps` is 10: it has no key `more`"),
            ("training.steps=[", "the value of `--set training.steps=[` is not valid YAML"),
            ("training..steps=1", "a part of the key is empty"),
        ] {
            let error = set(&mut root, argument, shorthand).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
