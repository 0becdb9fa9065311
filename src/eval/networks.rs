//! The networks that judge pictures, from files, folders or the hub. None of them ships with this program: what is not
//! named is not measured, and the table says so.

use crate::error::{Error, Result};
use crate::io::Weights;
use crate::io::hub::{self, HubOptions, RepoId, Wanted};
use crate::model::clip::{self, Clip};
use crate::model::inception::Inception;
use crate::model::perceptual::Perceptual;
use crate::pose::{PoseNetwork, PoseSpec};
use crate::progress::tell;
use std::path::{Path, PathBuf};

/// Where the weights are: each a file, a folder, `owner/name` or `owner/name:file` on the hub.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// InceptionV3, for FID and KID.
    pub inception: Option<String>,
    /// AlexNet and the heads of LPIPS, in one file or two.
    pub lpips: Vec<String>,
    /// CLIP, Chinese CLIP, or both.
    pub clip: Vec<String>,
    /// A pose network, for the anatomy rate: `posenet`, `openpose`, or the file of a heatmap network.
    pub pose: Option<String>,
    /// Take hub files from the local cache only.
    pub offline: bool,
}

/// The networks that are there.
#[derive(Default)]
pub struct Networks {
    /// For FID and KID.
    pub inception: Option<Inception>,
    /// For LPIPS.
    pub perceptual: Option<Perceptual>,
    /// For prompts without Chinese letters.
    pub clip: Option<Clip>,
    /// For prompts with Chinese letters.
    pub chinese_clip: Option<Clip>,
    /// For the anatomy rate.
    pub pose: Option<Box<dyn PoseNetwork>>,
}

/// The only file that is looked for in a repository of one network if none is named.
const HUB_FILE: &str = "model.safetensors";

impl Networks {
    /// Loads everything that has a place.
    ///
    /// Errors (usage): a place with nothing there, weights that are unreadable or of another network, two CLIPs of one
    /// language; errors of the hub.
    pub fn open(places: &Places) -> Result<Self> {
        let mut networks = Self::default();
        let weights = |place: &String| Weights::open(&locate(place, &Wanted::default(), places.offline)?);
        if let Some(place) = &places.inception {
            networks.inception = Some(Inception::load(&weights(place)?)?);
        }
        if !places.lpips.is_empty() {
            networks.perceptual =
                Some(Perceptual::load(&places.lpips.iter().map(weights).collect::<Result<Vec<_>>>()?)?);
        }
        if let Some(network) = &places.pose {
            let spec = PoseSpec { network: network.clone(), ..PoseSpec::default() };
            let environment = HubOptions::from_env();
            let options = HubOptions { offline: places.offline || environment.offline, ..environment };
            networks.pose = Some(spec.load(options, &mut |notice| tell(format_args!("note: {notice}")))?);
        }
        for place in &places.clip {
            let small = clip::SMALL_FILES.map(String::from).to_vec();
            let wanted = Wanted { files: vec![small[0].clone(), HUB_FILE.into()], optional: small, parts: Vec::new() };
            let clip = Clip::load(&locate(place, &wanted, places.offline)?)?;
            let slot = if clip.is_chinese() { &mut networks.chinese_clip } else { &mut networks.clip };
            if slot.replace(clip).is_some() {
                return Err(Error::usage("two CLIP models of one language")
                    .detail(places.clip.join(" and "))
                    .hint("give one CLIP, one Chinese CLIP, or one of each"));
            }
        }
        Ok(networks)
    }
}

/// The file or folder on this machine that `place` means. From the hub come the files of `wanted`, or if there are none
/// the one file behind the colon.
fn locate(place: &str, wanted: &Wanted, offline: bool) -> Result<PathBuf> {
    let path = Path::new(place);
    if path.exists() {
        return Ok(path.into());
    }
    let (name, file) = place.split_once(':').unwrap_or((place, HUB_FILE));
    let single = wanted.files.is_empty();
    let Some(repo) = RepoId::parse(name).filter(|_| single || !place.contains(':')) else {
        return Err(Error::usage(format!("no weights at `{place}`"))
            .expected("a file, a folder or a hub id (owner/name)", "nothing of that name"));
    };
    let wanted = if single { Wanted { files: vec![file.into()], ..Wanted::default() } } else { wanted.clone() };
    let environment = HubOptions::from_env();
    let observer = Some(hub::progress_bar(name));
    let options = HubOptions { offline: offline || environment.offline, observer, ..environment };
    let folder = hub::fetch(&repo, &wanted, &|_| Ok(()), &options)?;
    Ok(if single { folder.join(file) } else { folder })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_is_nowhere_is_named() {
        for place in ["weights/of/nothing.safetensors", "nothing.safetensors", "/nowhere", "a:b"] {
            let places = Places { inception: Some(place.into()), ..Places::default() };
            let error = Networks::open(&places).err().unwrap();
            assert!(error.exit_code() == 2 && error.to_string().contains(place), "{error}");
        }
        let places = Places { clip: vec!["owner/name:file".into()], ..Places::default() };
        assert!(Networks::open(&places).err().unwrap().to_string().contains("no weights at `owner/name:file`"));
    }
}
