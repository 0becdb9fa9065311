//! A small drawn world: pictures of plain objects and stick figures with captions in English and Chinese, drawn by code
//! from a seed. Because every picture is a function of a few attributes, what a network makes of a prompt can be checked
//! without another network.
//!
//! A [`Scene`] says what a picture shows, a [`Caption`] says it in words, a [`Drawing`] places it, and
//! [`Drawing::render`] gives pixels.

pub mod canvas;
pub mod caption;
pub mod check;
pub mod drawing;
pub mod figure;
pub mod folder;
pub mod objects;
pub mod scene;
pub mod split;
pub mod style;

pub use caption::{Caption, Language};
pub use drawing::Drawing;
pub use scene::{Colour, Place, Pose, Scene, Shape};
pub use split::{Kind, Split};
pub use style::Style;

/// Width and height of every picture.
pub const SIDE: usize = 128;
