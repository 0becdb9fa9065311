//! The sections of the config file. The doc comments are the user's reference: `docs/config.md` is made from them.

use crate::config::NO_PROMPT;
use crate::config::field::{At, Field, Range, section};
use crate::config::memory::MemoryLimit;
use crate::config::size::ImageSize;
use crate::config::tree::{Content, Node};
use crate::config::types::{
    BaseDtype, Betas, CheckpointingChoice, ComputeDtype, HeldOut, LoraInit, LossWeighting, LrSchedule, Masks,
    ModulationChoice, Optimizer, Positive, Rank, Resolutions, SaveDtype, Shift, SigmaSampling, SwapChoice,
    TrainingMode,
};
use crate::error::Result;
use std::path::PathBuf;

section! {
    /// The base model.
    pub struct Model shorthand path {
        /// A hub id (`Qwen/Qwen-Image`), a folder in the diffusers layout, or one that is built in: `synthetic:world`,
        /// a small model of a drawn world, or `synthetic:tiny`, a tiny random one to try things out.
        path: String;
        /// Branch, tag or commit of the hub repository; null means `main`.
        revision: Option<String> = None;
        /// Type in which the transformer's weights are held; `auto` is f32 with `training.mode: full`, else the compute type
        /// `training.dtype`, or `int8` where only that makes the run fit into `training.memory`. `int8` quantises the matrices of
        /// the blocks as they are read, in blocks of 32 values with a scale each: half the memory of bf16, a quarter of f32; for
        /// `training.mode: lora` alone.
        dtype: BaseDtype = BaseDtype::Auto;
        /// Where the weights of the modulation are, a third of the model: `resident` in memory; `streamed` from the disk, so that
        /// what they give at the noise levels of the next hundred or so steps is computed ahead, the same bit for bit; or
        /// `auto`, which streams only where that makes the run fit into `training.memory`. What trains the modulation or
        /// the time embedding needs them in memory.
        modulation: ModulationChoice = ModulationChoice::Auto;
        /// How many of the transformer's blocks wait in the memory of the machine, from where they are copied to the GPU just
        /// before they are needed, the same bit for bit: 0, 3 or more (two of them are on the GPU at any time), at most all; or
        /// `auto`, which is 0 unless only that makes the run fit into `training.memory`. For `training.mode: lora` alone; on
        /// the CPU it works and saves nothing.
        blocks_to_swap: SwapChoice = SwapChoice::Auto;
        /// Take hub files from the local cache only and never go to the network.
        offline: bool = false;
        /// A file with the transformer, in place of the one in `path`: safetensors in f32, bf16, f16 or fp8 with scales, or
        /// GGUF, under diffusers' names or ComfyUI's. What is quantised in the file is held as `dtype` says.
        transformer: Option<PathBuf> = None;
        /// A file with the VAE, in place of the one in `path`.
        vae: Option<PathBuf> = None;
        /// A file with the text encoder, in place of the one in `path`.
        text_encoder: Option<PathBuf> = None;
    }
}

section! {
    /// How the weights are updated.
    pub struct Training {
        /// Images in one forward pass. A bucket with fewer images left gives a smaller batch.
        batch_size: usize = 1, Range::at_least(1.0);
        /// Forward passes whose gradients are averaged into one step.
        gradient_accumulation: usize = 1, Range::at_least(1.0);
        /// Peak learning rate.
        learning_rate: f64 = 1e-4, Range::between(0.0, 1.0);
        /// How the learning rate moves: `constant` and `linear` (down to 0 at `max_steps`) after the warm-up;
        /// `cosine` down to 0 without warm-up; `cosine_with_warmup`.
        lr_scheduler: LrSchedule = LrSchedule::Constant;
        /// Steps over which the learning rate rises from 0. Not used by `cosine`.
        warmup_steps: usize = 0, Range::at_least(0.0);
        /// Steps in the run; one step is one update of the weights.
        max_steps: usize = 2000, Range::at_least(1.0);
        /// The optimizer.
        optimizer: Optimizer = Optimizer::AdamW;
        /// Decay rates of AdamW's two moments.
        betas: Betas = Betas::default();
        /// Added to the denominator of AdamW's update.
        eps: f64 = 1e-8, Range::above(0.0);
        /// Decoupled weight decay: each step shrinks the weights by the factor `1 - learning rate * weight_decay`.
        weight_decay: f64 = 0.01, Range::between(0.0, 1.0);
        /// Gradients are scaled down to this norm, taken over all of them together, if theirs is larger; 0 turns
        /// clipping off.
        max_grad_norm: f64 = 1.0, Range::at_least(0.0);
        /// Compute type. `auto` is bf16 on a GPU and f32 on the CPU. Adapter, optimizer state and loss are always f32.
        dtype: ComputeDtype = ComputeDtype::Auto;
        /// What the forward pass keeps for the backward pass: `none` keeps everything (fastest, most memory), `full`
        /// only the input of each block, `selective` lies between. The results are the same bit for bit. `auto`, which is
        /// the default where there is a `memory`, is the fastest that fits.
        checkpointing: CheckpointingChoice = CheckpointingChoice::Full;
        /// The most memory that the run may take on its device: `auto` (what is free when it begins, less a tenth), a size,
        /// or null for no limit. `checkpointing`, `dtype`, `model.dtype`, `model.modulation` and `model.blocks_to_swap` are
        /// chosen to fit where they are left open; a run that nothing makes fit is refused, and one that takes more all the same saves and stops.
        memory: Option<MemoryLimit> = None;
        /// `lora` trains an adapter, `full` all weights of the transformer, which must then be held in f32.
        mode: TrainingMode = TrainingMode::Lora;
    }
}

section! {
    /// The adapter.
    pub struct Lora {
        /// Rank of the adapter: its size and capacity.
        rank: Rank = Rank::new(16).expect("16 is a rank");
        /// Strength of the adapter: its output is multiplied by `alpha / rank`.
        alpha: f64 = 16.0, Range::above(0.0);
        /// Multiply by `alpha / sqrt(rank)` instead (rank-stabilised LoRA).
        rslora: bool = false;
        /// How the A matrices start: `gaussian` (normal, standard deviation 1/rank) or `kaiming`. B starts at 0.
        init: LoraInit = LoraInit::Gaussian;
        /// Which linears get an adapter: the groups `qkv`, `mlp`, `fusion`, `modulation` and `entry`, each also for
        /// one stream (`qkv.visual`, `mlp.text`), exact names, suffixes such as `attn.to_out.0`, globs, and regular
        /// expressions after `re:`. An entry is text, or a map `{name, rank, alpha}` to give it a rank and alpha of its own.
        target_modules: Targets = Targets::new(&["qkv", "mlp", "fusion"]);
    }
}

section! {
    /// One entry of `lora.target_modules`.
    pub struct Target shorthand name {
        /// The group, name, suffix, glob or `re:` pattern.
        name: String;
        /// Rank for the linears that this entry names; null means `lora.rank`.
        rank: Option<Rank> = None;
        /// Alpha for the linears that this entry names; null means `lora.alpha`.
        alpha: Option<Positive> = None;
    }
}

/// The entries of `lora.target_modules`: at least one.
#[derive(Clone, Debug, PartialEq)]
pub struct Targets(Vec<Target>);

impl Targets {
    /// Targets by name, with the rank and alpha of the section.
    pub fn new(names: &[&str]) -> Self {
        Self(names.iter().map(|name| Target { name: (*name).into(), ..Default::default() }).collect())
    }

    /// The entries, in the order of the file.
    pub fn entries(&self) -> &[Target] {
        &self.0
    }
}

impl Field for Targets {
    fn kind() -> String {
        "a list of names, or of maps {name, rank, alpha}".into()
    }
    fn schema() -> serde_json::Value {
        serde_json::json!({"type": "array", "minItems": 1, "items": Target::schema()})
    }
    fn read(node: &Node, at: &At) -> Result<Self> {
        match &node.content {
            Content::List(list) if !list.is_empty() => {
                let entries = list.iter().enumerate().map(|(i, entry)| Target::read(entry, &at.child(i)));
                Ok(Self(entries.collect::<Result<_>>()?))
            }
            Content::Text(_) => Err(at.unexpected(node, Self::kind()).hint("put it in brackets: `[qkv, mlp]`")),
            _ => Err(at.unexpected(node, Self::kind())),
        }
    }
    fn write(&self) -> Node {
        let entry = |target: &Target| match target {
            Target { name, rank: None, alpha: None } => name.write(),
            target => target.write(),
        };
        Node::made(Content::List(self.0.iter().map(entry).collect()))
    }
}

impl Lora {
    /// Rank and alpha of one of the `target_modules`.
    pub fn rank_and_alpha(&self, target: &Target) -> (Rank, f64) {
        (target.rank.unwrap_or(self.rank), target.alpha.map_or(self.alpha, Positive::get))
    }

    /// The factor on the output of an adapter: `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA.
    pub fn scale(&self, rank: Rank, alpha: f64) -> f64 {
        let rank = rank.get() as f64;
        alpha / if self.rslora { rank.sqrt() } else { rank }
    }
}

section! {
    /// The images.
    pub struct Data {
        /// Folder with the images and their captions: `name.txt` beside `name.jpg`, `.png` or `.webp`.
        path: PathBuf;
        /// Side in pixels of the square with as many pixels as a training image: images keep their shape, in steps of
        /// 16 pixels. With a list, every image is trained at each of the resolutions.
        resolution: Resolutions = Resolutions::default();
        /// Caption of images that have no caption file; null makes such an image an error.
        default_caption: Option<String> = None;
        /// Longest prompt, in tokens; what is longer is cut off.
        max_sequence_length: usize = 512, Range::between(1.0, 1024.0);
        /// Images that are left out: a map with the keys below.
        filter: Filter = Filter::default();
        /// Masks that say which parts of an image count in the loss, white fully and black hardly: `beside` takes
        /// `name.mask.png` beside `name.jpg`, a folder is searched for `name.png` under the same path.
        masks: Masks = Masks::None;
        /// Share of samples that are trained without their caption, with a space instead: the negative prompt when there is
        /// none of your own.
        caption_dropout: f64 = 0.05, Range::between(0.0, 1.0);
        /// Weight in the loss of a sample trained with its caption, relative to one whose caption was dropped. It is
        /// divided by its mean, so that the loss as a whole does not grow.
        caption_weight: f64 = 1.0, Range::between(0.0, 1000.0);
        /// Factor on the pose and count terms of the loss, whose shares are `loss.weights`; 0 turns them off, and `loss`
        /// then does nothing.
        pose_loss_weight: f64 = 0.0, Range::at_least(0.0);
        /// Images that are kept out of training to measure the held-out loss: a number of them, or a share, which is
        /// rounded down and never more than 32. 0 trains on everything and measures nothing.
        held_out: HeldOut = HeldOut::Fraction(0.05);
        /// Batches that are prepared in the background.
        prefetch: usize = 2, Range::between(1.0, 64.0);
        /// Where latents and prompt embeddings are kept between runs; null means `.cache` beside the run directory.
        cache_dir: Option<PathBuf> = None;
    }
}

section! {
    /// Images that are left out when the data set is indexed. Each of them is named with its reason in `filtered.jsonl`
    /// of the run directory; the files stay as they are.
    pub struct Filter {
        /// Pixels that both sides of an image must have; 0 takes any image.
        min_size: usize = 0, Range::between(0.0, 65536.0);
        /// Hands that the pose network may find in an image at most; null takes any number.
        max_hands: Option<usize> = None;
        /// Legs that it may find in an image at most, told by knees and ankles; null takes any number.
        max_legs: Option<usize> = None;
        /// Whether it must find a person.
        require_person: bool = false;
    }
}

section! {
    /// Weights of the parts of an image in the loss. The weights of an image are divided by their mean, so that they move
    /// emphasis and not the learning rate.
    pub struct Regions {
        /// Weight of where a person is; elsewhere it is 1.
        person: f64 = 1.0, Range::between(0.05, 100.0);
        /// Weight of arms and legs.
        limbs: f64 = 1.0, Range::between(0.05, 100.0);
        /// Weight of hands.
        hands: f64 = 1.0, Range::between(0.05, 100.0);
        /// Exponent on the share of a latent that lies in a region, and on the brightness of a mask: below 1 it
        /// widens soft edges.
        gamma: f64 = 0.7, Range::between(0.1, 10.0);
        /// Weight of what a mask paints black: what counts for nothing at all grows phantom limbs.
        floor: f64 = 0.05, Range::between(0.05, 1.0);
    }
}

section! {
    /// The structured loss: persons in the picture, beside its latents. It acts where `data.pose_loss_weight` is above 0.
    pub struct Loss {
        /// Shares of the terms in the loss of a sample, where the gate is open.
        weights: LossWeights = LossWeights::default();
        /// Noise levels at which pose and count act.
        gate: LossGate = LossGate::default();
        /// They act in every so manyth step.
        every: usize = 1, Range::between(1.0, 10000.0);
        /// Longest side in pixels of the piece of a picture that is decoded for them: what bounds their cost.
        crop: usize = 256, Range::between(32.0, 2048.0);
        /// A tiny decoder (TAEHV's `taew2_1`, as .pth or .safetensors) in place of the VAE's own: cheaper and rougher.
        decoder: Option<PathBuf> = None;
    }
}

section! {
    /// Shares of the terms. Each term is brought to the size of the reconstruction first, by running means.
    pub struct LossWeights {
        /// The squared error of the latents, which has weight 1 where pose and count do not act.
        reconstruction: f64 = 0.7, Range::at_least(0.0);
        /// Distance of the pose maps from those of the target.
        pose: f64 = 0.2, Range::at_least(0.0);
        /// Numbers of hands (or limb ends, if the pose network knows no hands) against those of the target.
        count: f64 = 0.1, Range::at_least(0.0);
    }
}

section! {
    /// A window over the noise levels, with smooth flanks.
    pub struct LossGate {
        /// Lowest noise level at which it is fully open.
        from: f64 = 0.1, Range::between(0.0, 1.0);
        /// Highest noise level at which it is fully open.
        to: f64 = 0.5, Range::between(0.0, 1.0);
        /// Width of the flanks on both sides.
        taper: f64 = 0.1, Range::between(0.0, 1.0);
    }
}

section! {
    /// The network that finds persons, hands and limbs; see `qwen-lora pose --help`.
    pub struct Pose shorthand network {
        /// `posenet` (built in, for photos), `world` (built in, for the drawn world), `openpose` (non-commercial weights), or
        /// the file of a heatmap network.
        network: String = "posenet".into();
        /// OpenPose's body weights: a file, a folder or a hub id.
        body: String = "lllyasviel/Annotators".into();
        /// `builtin` finds and counts hands in photos, for the loss, the weights of regions and the filters. OpenPose's hand
        /// weights (a file, a folder or a hub id) give points for `qwen-lora pose` alone. Without either, hands are where
        /// wrists end, unless the network knows them.
        hand: Option<String> = None;
    }
}

section! {
    /// Noise levels. A sample is `(1 - sigma) * image + sigma * noise`.
    pub struct Flow {
        /// Distribution of the noise levels before the shift: `uniform`, or `logit_normal`, which prefers the middle.
        sampling: SigmaSampling = SigmaSampling::LogitNormal;
        /// Mean of the normal behind `logit_normal`.
        logit_mean: f64 = 0.0, Range::between(-20.0, 20.0);
        /// Standard deviation of the normal behind `logit_normal`.
        logit_std: f64 = 1.0, Range::between(0.0, 20.0);
        /// Moves the noise levels towards more noise: a factor `s` (sigma becomes `s*sigma / (1 + (s-1)*sigma)`),
        /// `dynamic` (the scheduler's factor, which grows with the image: 1.83 at 768x768, 2.00 at 1024x1024), or `none`.
        shift: Shift = Shift::Dynamic;
        /// Lowest noise level.
        sigma_min: f64 = 0.0, Range::between(0.0, 1.0);
        /// Highest noise level. The levels are stretched into the range from `sigma_min` to `sigma_max`.
        sigma_max: f64 = 1.0, Range::between(0.0, 1.0);
        /// Weight of a sample in the loss by its noise level: `none`, or `bell`, which prefers the middle
        /// and has mean 1 over the noise levels drawn.
        weighting: LossWeighting = LossWeighting::None;
    }
}

section! {
    /// What is written during the run.
    pub struct Save {
        /// A checkpoint every so many steps; 0 writes only the last one.
        every: usize = 500, Range::at_least(0.0);
        /// How many checkpoints stay, the newest ones; 0 keeps all.
        keep: usize = 3, Range::at_least(0.0);
        /// Type of the numbers in the exported adapter. Checkpoints are always f32.
        dtype: SaveDtype = SaveDtype::F32;
    }
}

section! {
    /// The held-out loss: the loss on images that are not trained on, with the same noise every time.
    pub struct Evaluation {
        /// Measured every so many steps, and at the start and the end; 0 turns it off.
        every: usize = 100, Range::at_least(0.0);
        /// Noise levels per image, spread evenly over their distribution.
        num_sigmas: usize = 4, Range::between(1.0, 100.0);
    }
}

section! {
    /// Pictures made during the run, always of the same prompts and seeds: by the base model and with what is trained,
    /// side by side in `samples/` and in `report.html`. They never change the training.
    pub struct Preview {
        /// Made every so many steps, and at the end; 0 turns previews off.
        every: usize = 0, Range::at_least(0.0);
        /// What to show: one row of pictures each. A text of the form `{subject: 女孩, style: 赛博朋克}` is a prompt in
        /// parts, see `qwen-lora prompt --help`.
        prompts: Vec<String> = Vec::new();
        /// What not to show.
        negative_prompt: String = NO_PROMPT.into();
        /// Each prompt is drawn once with each seed.
        seeds: Vec<u64> = vec![0];
        /// Denoising steps of a picture.
        steps: usize = 20, Range::between(1.0, 1000.0);
        /// Size of a picture, such as `512x768` or `16:9`; null means a square of the first `data.resolution`.
        size: Option<ImageSize> = None;
        /// Scale of classifier-free guidance; 1 turns it off and halves the time.
        guidance: f64 = 4.0, Range::between(1.0, 100.0);
    }
}
