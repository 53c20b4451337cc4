//! An HTTP/1 server on a port that anybody may dial.
//!
//! A connection is one request and its answer, within a few seconds, with a small head and no
//! body. There is a bounded number of them; when one more comes, the oldest of the address that
//! holds most of them ends. So whoever opens as many as they can takes from themselves, and a
//! scrape from elsewhere gets its answer.

use std::{
    io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_stream::{StreamExt as _, wrappers::TcpListenerStream};
use tokio_util::sync::CancellationToken;

use crate::socket::Accepting;

/// How many connections there are at most.
const MOST_CONNECTIONS: usize = 64;
/// How long the head of a request may take to arrive.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// How long a connection may take as a whole; kubelet gives up on `/healthz` after ten seconds.
const ALL_WITHIN: Duration = Duration::from_secs(10);
/// The largest head of a request in bytes, and how many fields it may have.
const LARGEST_HEAD: usize = 16 * 1024;
const MOST_FIELDS: usize = 64;
/// What is read and thrown away of what a client sends beyond its request, and for how long: a
/// connection that is closed with something unread is reset, and the client may lose the answer.
const MOST_IGNORED: u64 = 256 * 1024;
const IGNORED_WITHIN: Duration = Duration::from_millis(500);
/// What running requests may take when the process ends.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(4);

/// What is answered to a request for a page.
pub(super) type Page = Response<Full<Bytes>>;

/// A page of plain text.
pub(super) fn text(status: StatusCode, content_type: &'static str, text: String) -> Page {
    let mut page = Response::new(Full::new(Bytes::from(text)));
    *page.status_mut() = status;
    let content_type = header::HeaderValue::from_static(content_type);
    page.headers_mut()
        .insert(header::CONTENT_TYPE, content_type);
    page
}

pub(super) const PLAIN: &str = "text/plain; charset=utf-8";

/// Serves one page at `path` until `stop`.
///
/// # Errors
/// When the listener ends, which it does not by itself.
pub(super) async fn serve<F, A>(
    listener: TcpListener,
    path: &'static str,
    page: F,
    stop: CancellationToken,
) -> io::Result<()>
where
    F: Fn() -> A + Clone + Send + 'static,
    A: Future<Output = Page> + Send + 'static,
{
    let doors = Doors::default();
    let mut incoming = Accepting::new(path, TcpListenerStream::new(listener));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            Some(Ok(stream)) = incoming.next() => {
                // One that has gone already has no address.
                if let Ok(peer) = stream.peer_addr() {
                    let door = doors.open(peer.ip().to_canonical());
                    connections.spawn(connection(stream, path, page.clone(), door));
                }
            }
            else => return Err(io::Error::other("the listener ended")),
        }
    }
    drop(incoming);
    let _ = timeout(DRAIN_TIMEOUT, connections.join_all()).await;
    Ok(())
}

/// Answers one request, whatever becomes of it.
async fn connection<F, A>(stream: TcpStream, path: &'static str, page: F, door: Door)
where
    F: Fn() -> A + Clone + Send + 'static,
    A: Future<Output = Page> + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let page = page.clone();
        let answer = match (request.uri().path() == path, request.method()) {
            (false, _) => Some(text(StatusCode::NOT_FOUND, PLAIN, "not found\n".to_owned())),
            (true, &Method::GET | &Method::HEAD) => None,
            (true, _) => {
                let words = "only GET and HEAD\n".to_owned();
                Some(text(StatusCode::METHOD_NOT_ALLOWED, PLAIN, words))
            }
        };
        async move {
            Ok::<_, std::convert::Infallible>(match answer {
                Some(answer) => answer,
                None => page().await,
            })
        }
    });
    let served = async {
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WITHIN)
            .max_buf_size(LARGEST_HEAD)
            .max_headers(MOST_FIELDS)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service)
            .without_shutdown()
            .await;
        // What a client does wrong is its own affair.
        if let Ok(parts) = served {
            let mut stream = parts.io.into_inner();
            let _ = stream.shutdown().await;
            let mut ignored = stream.take(MOST_IGNORED);
            let mut nowhere = tokio::io::sink();
            let ignoring = tokio::io::copy(&mut ignored, &mut nowhere);
            let _ = timeout(IGNORED_WITHIN, ignoring).await;
        }
    };
    tokio::select! {
        _ = timeout(ALL_WITHIN, served) => {}
        () = door.closed.cancelled() => {}
    }
}

/// The connections there are, in the order in which they came.
#[derive(Default)]
struct Doors(Arc<Mutex<Vec<Held>>>);

struct Held {
    peer: IpAddr,
    closed: CancellationToken,
}

/// One connection's place, until it is dropped.
struct Door {
    doors: Arc<Mutex<Vec<Held>>>,
    closed: CancellationToken,
}

impl Doors {
    /// A place for one more connection. Closes another if there are too many.
    fn open(&self, peer: IpAddr) -> Door {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.len() >= MOST_CONNECTIONS {
            let of = |peer: IpAddr| held.iter().filter(|other| other.peer == peer).count();
            // The first of those that are equal is the oldest.
            let most = held.iter().map(|other| of(other.peer)).max();
            let oldest = held.iter().position(|other| Some(of(other.peer)) == most);
            if let Some(oldest) = oldest {
                held.remove(oldest).closed.cancel();
            }
        }
        let closed = CancellationToken::new();
        held.push(Held {
            peer,
            closed: closed.clone(),
        });
        Door {
            doors: Arc::clone(&self.0),
            closed,
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // A closed door has left the list; no other token is cancelled by this.
        self.closed.cancel();
        let mut held = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|other| !other.closed.is_cancelled());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However many connections from however few addresses: there are never too many, the
        /// newest is there, and whoever has the fewest keeps them.
        #[test]
        fn whoever_opens_most_loses(peers in proptest::collection::vec(0..6_u8, 1..400)) {
            let doors = Doors::default();
            let mut open: Vec<(u8, Door)> = Vec::new();
            let address = |peer: u8| IpAddr::from([10, 0, 0, peer]);
            for peer in peers {
                let before = open.by_peer();
                open.push((peer, doors.open(address(peer))));
                let closed: Vec<u8> = open
                    .iter()
                    .filter(|(_, door)| door.closed.is_cancelled())
                    .map(|(peer, _)| *peer)
                    .collect();
                prop_assert!(closed.len() <= 1);
                if let Some(closed) = closed.first() {
                    prop_assert_eq!(before.iter().max(), Some(&before[usize::from(*closed)]));
                }
                open.retain(|(_, door)| !door.closed.is_cancelled());
                prop_assert!(open.len() <= MOST_CONNECTIONS);
                prop_assert_eq!(doors.0.lock().unwrap().len(), open.len());
                prop_assert_eq!(open.last().map(|(peer, _)| *peer), Some(peer));
            }
            drop(open);
            prop_assert!(doors.0.lock().unwrap().is_empty());
        }
    }

    trait Counts {
        fn by_peer(&self) -> [usize; 6];
    }

    impl Counts for Vec<(u8, Door)> {
        fn by_peer(&self) -> [usize; 6] {
            let mut counts = [0; 6];
            for (peer, _) in self {
                counts[usize::from(*peer)] += 1;
            }
            counts
        }
    }
}
