//! Grid expressions of the manifest: `cdiv(width, BLOCK) * samples`.
//!
//! Names, integers, `+ - * //`, parentheses and `cdiv(a, b)`, `a / b` rounded up: the same text is a Python expression,
//! which the kernels' own tests evaluate.

use crate::error::{Error, Result};
use serde::Deserialize;
use std::fmt;

/// A parsed expression.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Expression {
    text: String,
    tree: Node,
}

#[derive(Debug)]
enum Node {
    Number(i64),
    Name(String),
    Operation(Operator, Box<[Node; 2]>),
}

#[derive(Clone, Copy, Debug)]
enum Operator {
    Add,
    Subtract,
    Multiply,
    /// Rounded towards negative infinity, as in Python.
    Divide,
    /// Rounded up.
    DivideUp,
}

impl Expression {
    /// The value, with numbers for the names.
    ///
    /// Errors: a name without a number, division by zero, overflow.
    pub(super) fn evaluate(&self, value: &dyn Fn(&str) -> Option<i64>) -> Result<i64> {
        self.tree.evaluate(value).map_err(|what| Error::run(what).detail(format!("in `{}`", self.text)))
    }
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

impl Node {
    fn evaluate(&self, value: &dyn Fn(&str) -> Option<i64>) -> Result<i64, String> {
        let (operator, [a, b]) = match self {
            Self::Number(n) => return Ok(*n),
            Self::Name(name) => return value(name).ok_or_else(|| format!("no value for `{name}`")),
            Self::Operation(operator, sides) => (operator, &**sides),
        };
        let (a, b) = (a.evaluate(value)?, b.evaluate(value)?);
        match operator {
            Operator::Add => a.checked_add(b),
            Operator::Subtract => a.checked_sub(b),
            Operator::Multiply => a.checked_mul(b),
            Operator::Divide if b > 0 => Some(a.div_euclid(b)),
            Operator::DivideUp if b > 0 => Some(-(-a).div_euclid(b)),
            Operator::Divide | Operator::DivideUp => None,
        }
        .ok_or_else(|| format!("{operator:?} of {a} and {b} has no value"))
    }
}

impl TryFrom<String> for Expression {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mut parser = Parser { rest: &text };
        let tree = parser.sum()?;
        parser.skip_spaces();
        match parser.rest {
            "" => Ok(Self { tree, text }),
            rest => Err(format!("cannot read `{rest}` in `{text}`")),
        }
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl Parser<'_> {
    fn skip_spaces(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take(&mut self, token: &str) -> bool {
        self.skip_spaces();
        self.rest.strip_prefix(token).map(|rest| self.rest = rest).is_some()
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.take(token) { Ok(()) } else { Err(format!("expected `{token}` before `{}`", self.rest)) }
    }

    fn sum(&mut self) -> Result<Node, String> {
        self.chain(&[("+", Operator::Add), ("-", Operator::Subtract)], Self::product)
    }

    fn product(&mut self) -> Result<Node, String> {
        self.chain(&[("*", Operator::Multiply), ("//", Operator::Divide)], Self::atom)
    }

    /// Operands joined by operators of one rank, from left to right.
    fn chain(
        &mut self,
        operators: &[(&str, Operator)],
        operand: fn(&mut Self) -> Result<Node, String>,
    ) -> Result<Node, String> {
        let mut tree = operand(self)?;
        while let Some((_, operator)) = operators.iter().find(|(token, _)| self.take(token)) {
            tree = Node::Operation(*operator, Box::new([tree, operand(self)?]));
        }
        Ok(tree)
    }

    fn atom(&mut self) -> Result<Node, String> {
        if self.take("(") {
            let tree = self.sum()?;
            return self.expect(")").map(|()| tree);
        }
        let end = self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        if word.is_empty() {
            return Err(format!("expected a name or a number before `{rest}`"));
        }
        self.rest = rest;
        if word == "cdiv" {
            self.expect("(")?;
            let a = self.sum()?;
            self.expect(",")?;
            let b = self.sum()?;
            self.expect(")")?;
            return Ok(Node::Operation(Operator::DivideUp, Box::new([a, b])));
        }
        match word.starts_with(|c: char| c.is_ascii_digit()) {
            true => word.parse().map(Node::Number).map_err(|_| format!("`{word}` is no number")),
            false => Ok(Node::Name(word.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_have_the_values_that_python_gives_them() {
        let value = |name: &str| [("a", 7), ("B_1", 3)].iter().find(|v| v.0 == name).map(|v| v.1);
        let evaluate = |text: &str| Expression::try_from(text.to_string())?.evaluate(&value).map_err(|e| e.to_string());
        for (text, expected) in [
            ("a", 7),
            ("a + B_1 * 2", 13),
            ("(a + B_1) * 2", 20),
            ("a - B_1 - 1", 3),
            ("cdiv(a, B_1) * 100 + a // B_1", 302),
            ("cdiv(a - 1, B_1) + cdiv(0, B_1)", 2),
            ("cdiv(cdiv(a, 2), B_1)", 2),
        ] {
            assert_eq!(evaluate(text), Ok(expected), "{text}");
        }
        for text in ["", "a +", "a b", "cdiv(a)", "(a", "a / 2", "2x"] {
            assert!(Expression::try_from(text.to_string()).is_err(), "{text}");
        }
        for text in ["c", "a // 0", "cdiv(1, 0 - a)", "9223372036854775807 * a"] {
            assert!(evaluate(text).is_err(), "{text}");
        }
    }
}
