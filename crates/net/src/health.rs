//! What the node's plugins say of themselves (STATUS), asked seldom and without keeping anybody waiting.
//!
//! Kubelet asks for the runtime's status every few seconds; a plugin's STATUS may take as long as it likes.
//! One inquiry runs at a time. Who asks waits for it a little and else gets the answer before it, so a plugin that becomes
//! slow does not make the node flap, and one that hangs is told of when its inquiry is ended.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::cni::{Chain, NetworkList, PluginError};
use crate::config::NetConfig;

/// How old an answer may become before the plugins are asked anew.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long who asks waits for an inquiry that runs.
const PATIENCE: Duration = Duration::from_secs(2);
/// The same while there is no answer before it: for `a3s-box run` it decides whether the box has a network.
const FIRST_PATIENCE: Duration = Duration::from_secs(5);
/// How long one plugin may think about it.
const LIMIT: Duration = Duration::from_secs(15);

/// What the plugins said: `Err` is why no pod can be connected.
pub(crate) type Answer = Result<(), Arc<PluginError>>;

/// The plugins' last word.
#[derive(Debug, Clone, Default)]
pub(crate) struct Health(Arc<Mutex<Option<Inquiry>>>);

#[derive(Debug)]
struct Inquiry {
    list: NetworkList,
    since: Instant,
    /// `None` while it runs; its end closes the channel.
    answer: watch::Receiver<Option<Answer>>,
    /// That of the inquiry before.
    before: Option<Answer>,
    /// Dropped with the inquiry, and with it a plugin that still runs.
    _task: JoinSet<()>,
}

impl Health {
    /// The plugins' word on a network that knows STATUS; `None`: they have not answered yet.
    pub(crate) async fn of(&self, list: &NetworkList, config: &NetConfig) -> Option<Answer> {
        let (mut answer, before) = self.inquiry(list, config);
        let patience = if before.is_some() { PATIENCE } else { FIRST_PATIENCE };
        let waited = tokio::time::timeout(patience, answer.wait_for(Option::is_some)).await;
        match waited {
            Ok(Ok(answer)) => answer.clone(),
            Ok(Err(_)) | Err(_) => before,
        }
    }

    fn inquiry(
        &self,
        list: &NetworkList,
        config: &NetConfig,
    ) -> (watch::Receiver<Option<Answer>>, Option<Answer>) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match &*last {
            Some(inquiry) if inquiry.list == *list => {
                let runs = inquiry.answer.has_changed().is_ok();
                if runs || inquiry.since.elapsed() < INTERVAL {
                    return (inquiry.answer.clone(), inquiry.before.clone());
                }
                inquiry.answer.borrow().clone()
            }
            // Another network, or the first one.
            Some(_) | None => None,
        };
        let (tell, answer) = watch::channel(None);
        let mut task = JoinSet::new();
        let limit = config.plugin_timeout.min(LIMIT);
        task.spawn(inquire(list.clone(), config.bin_dirs.clone(), limit, tell));
        let told = (answer.clone(), before.clone());
        *last = Some(Inquiry { list: list.clone(), since: Instant::now(), answer, before, _task: task });
        told
    }
}

async fn inquire(
    list: NetworkList,
    bin_dirs: Vec<PathBuf>,
    limit: Duration,
    tell: watch::Sender<Option<Answer>>,
) {
    let chain = Chain { list: &list, bin_dirs: &bin_dirs, limit };
    let answer = chain.status().await.map_err(Arc::new);
    tell.send_replace(Some(answer));
}
