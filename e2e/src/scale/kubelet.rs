//! kubelet's rhythm for one volume: publish it, look at it again and again, and wait longer after each
//! failure.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use proto::csi::node_client::NodeClient;
use rand::Rng as _;
use tonic::transport::Channel;

use super::record::{Answer, Record};
use crate::bench::{Backoff, Volume, publish};

/// The driver of a node, while it runs.
#[derive(Clone, Default)]
pub(super) struct Socket(Arc<Mutex<Option<NodeClient<Channel>>>>);

impl Socket {
    /// Sets the client of a driver that has started, or none of one that stops.
    pub(super) fn set(&self, client: Option<NodeClient<Channel>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = client;
    }

    fn get(&self) -> Option<NodeClient<Channel>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Publishes a volume for as long as the task lives. Each look follows the last one after `look` and
/// up to half as much more.
pub(super) async fn run(socket: Socket, volume: Arc<Volume>, look: Duration, record: Arc<Record>) {
    let (mut is_first, mut backoff) = (true, Backoff::default());
    loop {
        let good = match socket.get() {
            // kubelet knows no driver then; it waits as after a failure.
            None => false,
            Some(client) => {
                let started = Instant::now();
                let (time, answer) = publish(client, &volume).await;
                let failure = answer.err();
                let failure =
                    failure.map(|status| format!("{:?}: {}", status.code(), status.message()));
                let good = failure.is_none();
                // The driver may have been stopped during the call.
                if good || socket.get().is_some() {
                    record.answer(Answer {
                        at: started,
                        time,
                        failure,
                        is_first,
                    });
                }
                good
            }
        };
        let wait = if good {
            is_first = false;
            backoff = Backoff::default();
            look.mul_f64(rand::rng().random_range(1.0..1.5))
        } else {
            backoff.next()
        };
        tokio::time::sleep(wait).await;
    }
}
