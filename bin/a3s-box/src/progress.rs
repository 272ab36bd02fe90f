//! What people see while an image is pulled: a bar per layer at a terminal, plain lines elsewhere, nothing if
//! they asked for quiet. Always on stderr: stdout belongs to the command.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use a3s_box_image::PullProgress;
use a3s_box_image::digest::Digest;

use crate::tell;

/// How a pull is shown.
pub(crate) enum Show {
    /// Bars or lines, as stderr is.
    Progress,
    /// Nothing.
    Quiet,
}

/// The observer for one pull; `None` when nobody wants to see it.
pub(crate) fn observer(show: Show, image: &str) -> Option<Arc<dyn PullProgress>> {
    match show {
        Show::Quiet => None,
        Show::Progress if std::io::stderr().is_terminal() => Some(Arc::new(Bars::new(image))),
        Show::Progress => Some(Arc::new(Lines::new(image))),
    }
}

struct Bars {
    area: MultiProgress,
    title: ProgressBar,
    layers: Mutex<HashMap<Digest, ProgressBar>>,
}

impl Bars {
    fn new(image: &str) -> Self {
        let area = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        let title = area.add(ProgressBar::new_spinner().with_style(style("{spinner} {msg}")));
        title.set_message(format!("pulling {image}"));
        title.enable_steady_tick(std::time::Duration::from_millis(120));
        Self { area, title, layers: Mutex::default() }
    }
}

impl PullProgress for Bars {
    fn resolved(&self, layers: usize, bytes: u64) {
        let s = if layers == 1 { "" } else { "s" };
        self.title.set_message(format!("{}: {layers} layer{s}, {}", self.title.message(), HumanBytes(bytes)));
    }

    fn layer_started(&self, layer: &Digest, size: Option<u64>) {
        let bar = match size {
            Some(size) => ProgressBar::new(size)
                .with_style(style("  {prefix} {bar:32.cyan/dim} {bytes:>10}/{total_bytes} {bytes_per_sec}")),
            None => ProgressBar::new_spinner().with_style(style("  {prefix} {spinner} {bytes:>10}")),
        };
        bar.set_prefix(short(layer));
        let bar = self.area.add(bar);
        if let Ok(mut layers) = self.layers.lock() {
            layers.insert(layer.clone(), bar);
        }
    }

    fn layer_bytes(&self, layer: &Digest, downloaded: u64) {
        if let Ok(layers) = self.layers.lock()
            && let Some(bar) = layers.get(layer)
        {
            bar.set_position(downloaded);
        }
    }

    fn layer_finished(&self, layer: &Digest, _reused: bool) {
        if let Ok(mut layers) = self.layers.lock()
            && let Some(bar) = layers.remove(layer)
        {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.title.finish_and_clear();
        // A terminal that is gone cannot be cleared.
        let _ = self.area.clear();
    }
}

/// Says something only if there is something to download: `run` of what is here already is not worth a line.
struct Lines {
    image: String,
    started: Instant,
    announced: AtomicBool,
}

impl Lines {
    fn new(image: &str) -> Self {
        Self { image: image.to_owned(), started: Instant::now(), announced: AtomicBool::new(false) }
    }
}

impl PullProgress for Lines {
    fn layer_bytes(&self, _layer: &Digest, _downloaded: u64) {
        if !self.announced.swap(true, Ordering::Relaxed) {
            tell::err(format_args!("pulling {}\n", self.image));
        }
    }

    fn layer_finished(&self, layer: &Digest, reused: bool) {
        if !reused {
            let took = self.started.elapsed().as_secs_f64();
            tell::err(format_args!("  layer {} done after {took:.1} s\n", short(layer)));
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// The first digits of a digest, without its algorithm.
fn short(digest: &Digest) -> String {
    let text = digest.to_string();
    let hex = text.split_once(':').map_or(text.as_str(), |(_, hex)| hex);
    hex.chars().take(12).collect()
}
