//! `qwen-lora route`: which adapters a prompt gets, and why.

use crate::adapters::file::recorded_base;
use crate::cache::fingerprint;
use crate::cli::print_line;
use crate::error::Result;
use crate::model::source::{ModelSource, ModelSpec};
use crate::prompt::routing::{Decision, Router, Routes};
use crate::sample::{LoraUse, Recipe};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// The help text, with an example of the file.
const LONG_ABOUT: &str = "\
Show which adapters prompts get by a routes file, and why.

A routes file lists adapters with the words that call for them:

    adapters:
      - {file: ink.safetensors, triggers: [水墨, ink wash], weight: 0.6, group: style}
      - {file: anime.safetensors, triggers: [动漫, anime], negative_triggers: [照片, photo], group: style}

`<lora:ink:0.7>` in a prompt has the last word. `qwen-lora generate --auto-lora ROUTES.yaml` uses it.";

/// Show which adapters prompts get by a routes file, and why.
#[derive(Args, Clone, Debug)]
#[command(long_about = LONG_ABOUT)]
pub struct RouteArgs {
    /// The routes file
    #[arg(long, value_name = "ROUTES.yaml")]
    auto_lora: PathBuf,
    /// A prompt to explain (repeatable)
    #[arg(long = "explain", value_name = "PROMPT", required = true)]
    prompts: Vec<String>,
    /// Also check that the adapters were made for this model: hub id, folder, `synthetic:world` or `synthetic:tiny`
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Take a hub model from the local cache only
    #[arg(long)]
    offline: bool,
    /// Print the decisions as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the verb. Errors (usage): those of the routes file, an unknown name in a tag, an adapter for another model.
pub fn run(args: &RouteArgs) -> Result<()> {
    let router = Router::new(Routes::load(&args.auto_lora)?);
    let decisions = args.prompts.iter().map(|prompt| router.decide(prompt)).collect::<Result<_>>()?;
    let routing = Routing { router, decisions };
    if let Some(model) = &args.model {
        let pipeline = ModelSource::resolve(&ModelSpec { offline: args.offline, ..ModelSpec::new(model) })?;
        routing.check_bases(&fingerprint(&pipeline.transformer.files()?)?)?;
    }
    if args.json {
        return print_line(json!({ "decisions": routing.decisions }));
    }
    routing.explanation().try_for_each(print_line)
}

/// Routes and what they decided for each prompt.
pub struct Routing {
    router: Router,
    decisions: Vec<Decision>,
}

impl Routing {
    /// Decides for the prompts of a recipe; puts the prompts without their tags, and the adapters, into it.
    pub fn new(routes: &Path, recipe: &mut Recipe) -> Result<Self> {
        let router = Router::new(Routes::load(routes)?);
        let decisions: Vec<Decision> =
            recipe.prompts.iter().map(|prompt| router.decide(prompt)).collect::<Result<_>>()?;
        recipe.prompts = decisions.iter().map(|d| d.prompt.clone()).collect();
        let file = |i: usize| router.adapters()[i].file.to_string_lossy().into_owned();
        let uses = |d: &Decision| {
            d.taken().map(|(i, weight)| LoraUse { file: file(i), weight, hash: String::new() }).collect()
        };
        recipe.routed = decisions.iter().map(uses).collect();
        Ok(Self { router, decisions })
    }

    /// Refuses adapters that were made for another base than the one with this fingerprint, if a prompt takes them.
    pub fn check_bases(&self, fingerprint: &str) -> Result<()> {
        for (i, _) in self.decisions.iter().flat_map(Decision::taken) {
            let route = &self.router.adapters()[i];
            route.check_base(recorded_base(&route.file)?.as_deref(), fingerprint)?;
        }
        Ok(())
    }

    /// Why, in lines for a person.
    pub fn explanation(&self) -> impl Iterator<Item = String> {
        self.decisions.iter().flat_map(Decision::explanation)
    }
}
