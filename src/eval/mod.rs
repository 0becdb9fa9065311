//! What an adapter does, in numbers: pictures against pictures.

pub mod anatomy;
pub mod distance;
pub mod generated;
pub mod learned;
pub mod looks;
pub mod measure;
pub mod metrics;
pub mod networks;
pub mod output;
pub mod page;
pub mod pictures;
pub mod rating;
pub mod singular;
pub mod ssim;
pub mod statistics;
pub mod table;

pub use measure::{Comparison, Evaluation, measure};
pub use networks::{Networks, Places};
pub use pictures::{Picture, Set};
