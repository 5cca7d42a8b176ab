//! Small questions to other nodes, over one stream each: forwarded commands, read barriers, and
//! whether a leader still leads.
//!
//! A question is asked by a callback, not by a future: no task and no wake-up stands between the
//! stream that an answer arrives on and the request that waits for it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::clock::ClusterClock;
use super::network::Peers;
use super::types::Member;
use crate::proto::peer;
use crate::proto::peer::exchange_request::Request as Question;
use crate::proto::peer::exchange_response::Response as Answer;

/// A node whose stream broke is not asked for so long, lest every question to a node that is down
/// costs an attempt to connect.
const REOPEN_PAUSE: Duration = Duration::from_millis(100);

/// Questions that one node may leave unanswered before it is asked no more.
const QUESTIONS_MAX: usize = 4096;

/// No answer came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// The question never left this node.
    Unsent,
    /// The stream broke: whether the question was heard is not known.
    Unanswered,
}

type Answered = Box<dyn FnOnce(Result<Answer, Lost>) + Send>;

/// Streams to all peers, opened on first use and again after they broke.
pub(crate) struct Exchanges {
    peers: Arc<Peers>,
    streams: Mutex<HashMap<u64, Arc<OpenStream>>>,
}

struct OpenStream {
    incarnation: u64,
    clock: Arc<ClusterClock>,
    questions: mpsc::UnboundedSender<peer::ExchangeRequest>,
    waiting: Mutex<Waiting>,
    last_id: AtomicU64,
}

#[derive(Default)]
struct Waiting {
    answers: HashMap<u64, Answered>,
    /// Local monotonic time.
    broken_at: Option<Duration>,
}

impl Exchanges {
    pub(crate) fn new(peers: Arc<Peers>) -> Arc<Self> {
        Arc::new(Self { peers, streams: Mutex::new(HashMap::new()) })
    }

    /// Asks a node. `answered` is called once, from whatever task hears the answer. Those who ask
    /// bound what they have under way as well.
    pub(crate) fn ask(&self, node: u64, member: &Member, question: Question, answered: Answered) {
        let Some(stream) = self.stream(node, member) else {
            answered(Err(Lost::Unsent));
            return;
        };
        stream.ask(question, answered);
    }

    fn stream(&self, node: u64, member: &Member) -> Option<Arc<OpenStream>> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = streams.get(&node)
            && stream.incarnation == member.incarnation
        {
            match stream.lock().broken_at {
                None => return Some(stream.clone()),
                Some(at) if self.peers.clock.monotonic() < at + REOPEN_PAUSE => return None,
                Some(_) => {}
            }
        }
        let client = self.peers.exchange_client(node, member).ok()?;
        let (questions, outbound) = mpsc::unbounded_channel();
        let stream = Arc::new(OpenStream {
            incarnation: member.incarnation,
            clock: self.peers.clock.clone(),
            questions,
            waiting: Mutex::default(),
            last_id: AtomicU64::new(0),
        });
        let header = self.peers.header(node, member.incarnation);
        let opening =
            peer::ExchangeRequest { header: Some(header), correlation_id: 0, request: None };
        // The receiver is held right here, so the channel is open.
        let _ = stream.questions.send(opening);
        tokio::spawn(stream.clone().run(client, outbound));
        streams.insert(node, stream.clone());
        Some(stream)
    }
}

impl OpenStream {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, question: Question, answered: Answered) {
        let correlation_id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        {
            let mut waiting = self.lock();
            if waiting.broken_at.is_some() || waiting.answers.len() >= QUESTIONS_MAX {
                drop(waiting);
                answered(Err(Lost::Unsent));
                return;
            }
            waiting.answers.insert(correlation_id, answered);
        }
        let request =
            peer::ExchangeRequest { header: None, correlation_id, request: Some(question) };
        if self.questions.send(request).is_err() {
            self.fail();
        }
    }

    async fn run(
        self: Arc<Self>,
        mut client: peer::peer_service_client::PeerServiceClient<tonic::transport::Channel>,
        outbound: mpsc::UnboundedReceiver<peer::ExchangeRequest>,
    ) {
        let opened = client.exchange(UnboundedReceiverStream::new(outbound)).await;
        match opened {
            Ok(response) => {
                let mut answers = response.into_inner();
                while let Ok(Some(answer)) = answers.message().await {
                    let waiting = self.lock().answers.remove(&answer.correlation_id);
                    if let (Some(answered), Some(answer)) = (waiting, answer.response) {
                        answered(Ok(answer));
                    }
                }
            }
            Err(status) => {
                tracing::debug!(code = ?status.code(), message = status.message(), "peer refused");
            }
        }
        self.fail();
    }

    fn fail(&self) {
        let lost = {
            let mut waiting = self.lock();
            waiting.broken_at.get_or_insert(self.clock.monotonic());
            std::mem::take(&mut waiting.answers)
        };
        for answered in lost.into_values() {
            answered(Err(Lost::Unanswered));
        }
    }
}
