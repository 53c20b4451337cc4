//! An HTTP/1 server on a port that anybody can connect to.
//!
//! A connection carries one request and its answer within a few seconds, with a small head and no
//! body. The number of connections is bounded: one more closes the oldest one of the peer address
//! that has the most. A client that opens many connections thus closes its own, and a scrape from
//! another address is answered.

use std::{
    io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::{HeaderMap, Method, Request, Response, StatusCode, header};
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

/// The largest number of connections.
const MOST_CONNECTIONS: usize = 64;
/// The time in which the head of a request must arrive.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// The time that a connection may take as a whole. kubelet gives up on `/healthz` after ten
/// seconds.
const ALL_WITHIN: Duration = Duration::from_secs(10);
/// The largest head of a request in bytes, and the most fields that it may have.
const LARGEST_HEAD: usize = 16 * 1024;
const MOST_FIELDS: usize = 64;
/// The bytes beyond the request that are read and ignored, and the time that this may take. A
/// connection that is closed with unread bytes is reset, and the client may lose the answer.
const MOST_IGNORED: u64 = 256 * 1024;
const IGNORED_WITHIN: Duration = Duration::from_millis(500);
/// The time that running requests may take when the process ends.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(4);

/// The answer to a request for a page.
pub(super) type Page = Response<Full<Bytes>>;

/// Returns a page with this text.
pub(super) fn text(status: StatusCode, content_type: &'static str, text: String) -> Page {
    let mut page = Response::new(Full::new(Bytes::from(text)));
    *page.status_mut() = status;
    let content_type = header::HeaderValue::from_static(content_type);
    page.headers_mut()
        .insert(header::CONTENT_TYPE, content_type);
    page
}

pub(super) const PLAIN: &str = "text/plain; charset=utf-8";

/// Serves one page at `path` until `stop`. `page` makes it for the header fields of a request.
///
/// # Errors
/// Fails when the listener ends, which it does not by itself.
pub(super) async fn serve<F, A>(
    listener: TcpListener,
    path: &'static str,
    page: F,
    stop: CancellationToken,
) -> io::Result<()>
where
    F: Fn(&HeaderMap) -> A + Clone + Send + 'static,
    A: Future<Output = Page> + Send + 'static,
{
    let open = Connections::default();
    let mut incoming = Accepting::new(path, TcpListenerStream::new(listener));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            Some(Ok(stream)) = incoming.next() => {
                // A connection that is closed already has no peer address.
                if let Ok(peer) = stream.peer_addr() {
                    let connection = open.add(peer.ip().to_canonical());
                    connections.spawn(answer(stream, path, page.clone(), connection));
                }
            }
            else => return Err(io::Error::other("the listener ended")),
        }
    }
    drop(incoming);
    let _ = timeout(DRAIN_TIMEOUT, connections.join_all()).await;
    Ok(())
}

/// Answers one request, and ends when the connection is closed for another one.
async fn answer<F, A>(stream: TcpStream, path: &'static str, page: F, connection: Connection)
where
    F: Fn(&HeaderMap) -> A + Clone + Send + 'static,
    A: Future<Output = Page> + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let refusal = if request.uri().path() != path {
            Some(text(StatusCode::NOT_FOUND, PLAIN, "not found\n".to_owned()))
        } else if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let words = "only GET and HEAD\n".to_owned();
            Some(text(StatusCode::METHOD_NOT_ALLOWED, PLAIN, words))
        } else {
            None
        };
        let answer = match refusal {
            Some(refusal) => Err(refusal),
            None => Ok(page(request.headers())),
        };
        async move {
            Ok::<_, std::convert::Infallible>(match answer {
                Ok(page) => page.await,
                Err(refusal) => refusal,
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
        // An error of the client needs no log line.
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
        () = connection.closed.cancelled() => {}
    }
}

/// The open connections, the oldest first.
#[derive(Default)]
struct Connections(Arc<Mutex<Vec<OpenConnection>>>);

struct OpenConnection {
    peer: IpAddr,
    closed: CancellationToken,
}

/// A connection, which is open until this is dropped or `closed` is cancelled.
struct Connection {
    all: Arc<Mutex<Vec<OpenConnection>>>,
    closed: CancellationToken,
}

impl Connections {
    /// Adds a connection. Closes another one if there are too many.
    fn add(&self, peer: IpAddr) -> Connection {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= MOST_CONNECTIONS {
            let of = |peer: IpAddr| open.iter().filter(|other| other.peer == peer).count();
            let most = open.iter().map(|other| of(other.peer)).max();
            let oldest = open.iter().position(|other| Some(of(other.peer)) == most);
            if let Some(oldest) = oldest {
                open.remove(oldest).closed.cancel();
            }
        }
        let closed = CancellationToken::new();
        open.push(OpenConnection {
            peer,
            closed: closed.clone(),
        });
        Connection {
            all: Arc::clone(&self.0),
            closed,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The others in the list are open: a connection that was closed has left it.
        self.closed.cancel();
        let mut open = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|other| !other.closed.is_cancelled());
    }
}

/// Serves a connection that sends these bytes, and no more. Fails unless it is answered or closed.
#[cfg(any(test, fuzzing))]
pub(crate) async fn fuzz(bytes: &[u8]) {
    let (Ok(listener), stop) = (
        TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await,
        CancellationToken::new(),
    ) else {
        unreachable!("no socket");
    };
    let Ok(address) = listener.local_addr() else {
        unreachable!("a socket without an address");
    };
    let page = |_: &HeaderMap| std::future::ready(text(StatusCode::OK, PLAIN, "ok".to_owned()));
    let served = serve(listener, "/metrics", page, stop.clone());
    let called = async {
        let Ok(mut client) = TcpStream::connect(address).await else {
            unreachable!("no connection");
        };
        let _ = client.write_all(bytes).await;
        let _ = client.shutdown().await;
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer).await;
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1."));
        stop.cancel();
    };
    let _ = tokio::join!(served, called);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The number of connections stays bounded, the newest connection stays open, and a
        /// connection is only closed of an address that has the most.
        #[test]
        fn whoever_opens_most_loses(peers in proptest::collection::vec(0..6_u8, 1..400)) {
            let connections = Connections::default();
            let mut open: Vec<(u8, Connection)> = Vec::new();
            let address = |peer: u8| IpAddr::from([10, 0, 0, peer]);
            for peer in peers {
                let before = open.by_peer();
                open.push((peer, connections.add(address(peer))));
                let closed: Vec<u8> = open
                    .iter()
                    .filter(|(_, connection)| connection.closed.is_cancelled())
                    .map(|(peer, _)| *peer)
                    .collect();
                prop_assert!(closed.len() <= 1);
                if let Some(closed) = closed.first() {
                    prop_assert_eq!(before.iter().max(), Some(&before[usize::from(*closed)]));
                }
                open.retain(|(_, connection)| !connection.closed.is_cancelled());
                prop_assert!(open.len() <= MOST_CONNECTIONS);
                prop_assert_eq!(connections.0.lock().unwrap().len(), open.len());
                prop_assert_eq!(open.last().map(|(peer, _)| *peer), Some(peer));
            }
            drop(open);
            prop_assert!(connections.0.lock().unwrap().is_empty());
        }
    }

    trait Counts {
        fn by_peer(&self) -> [usize; 6];
    }

    impl Counts for Vec<(u8, Connection)> {
        fn by_peer(&self) -> [usize; 6] {
            let mut counts = [0; 6];
            for (peer, _) in self {
                counts[usize::from(*peer)] += 1;
            }
            counts
        }
    }
}
