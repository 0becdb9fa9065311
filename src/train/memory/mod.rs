//! How much memory training takes: told before anything is loaded, and held against what there is.

mod budget;
mod forecast;
mod limit;
mod machine;

pub use budget::{Budget, Choice};
pub use forecast::{Forecast, Step, StepShape, feeds_modulation};
pub use limit::{Settled, Watch};
pub use machine::{Machine, most_of};
