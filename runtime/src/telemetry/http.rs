//! A very small HTTP/1.1 server for pages that probes and scrapers read. It answers GET and HEAD, without bodies.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::shutdown::{Shutdown, Tasks};

/// What is answered for a path.
#[derive(Clone, Debug)]
pub struct Page {
    /// The status.
    pub status: StatusCode,
    /// The media type of the body.
    pub content_type: &'static str,
    /// The body.
    pub body: String,
}

/// Pages by path; `None` is answered with 404.
pub type Answer = Arc<dyn Fn(&str) -> Option<Page> + Send + Sync>;

/// So many connections are served at a time; more wait in the kernel's queue.
const CONNECTIONS: usize = 64;
/// A request's head has to be there in this time.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// No connection is kept longer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(300);

/// Serves `answer` on `listener` until shutdown. `name` is what logs call it.
pub async fn serve(name: &'static str, listener: TcpListener, answer: Answer, tasks: Tasks, shutdown: Shutdown) {
    let address = listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
    tracing::info!(address, "Serving {name}");
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.requested() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Descriptors may have run short: trying again at once would only burn time.
                tracing::warn!(%error, "Cannot accept a connection for {name}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (answer, shutdown) = (Arc::clone(&answer), shutdown.clone());
        tasks.spawn("http connection", async move {
            let _place = place;
            let service = service_fn(move |request| {
                let response = respond(&request, &answer);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // How a probe's connection ended is of no interest.
                _ = connection => {}
                () = tokio::time::sleep(CONNECTION_TIMEOUT) => {}
                () = shutdown.requested() => {}
            }
        });
    }
}

fn respond(request: &Request<Incoming>, answer: &Answer) -> Response<Full<Bytes>> {
    let plain = |status: StatusCode, body: &'static str| {
        let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
        *response.status_mut() = status;
        response
    };
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let Some(page) = answer(request.uri().path()) else { return plain(StatusCode::NOT_FOUND, "no such page\n") };
    let mut response = Response::new(Full::new(Bytes::from(page.body)));
    *response.status_mut() = page.status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(page.content_type));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn ask(address: std::net::SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("{request}\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn serves_pages_until_shutdown() {
        let (trigger, shutdown) = Shutdown::new();
        let tasks = Tasks::new(trigger.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let page = Page { status: StatusCode::OK, content_type: "text/plain", body: "hello".into() };
        let answer: Answer = Arc::new(move |path| (path == "/a").then(|| page.clone()));
        tasks.spawn("pages", serve("pages", listener, answer, tasks.clone(), shutdown));
        let text = ask(address, "GET /a?x=1 HTTP/1.1").await;
        assert!(text.starts_with("HTTP/1.1 200 OK") && text.ends_with("\r\n\r\nhello"), "{text}");
        assert!(ask(address, "HEAD /a HTTP/1.1").await.ends_with("\r\n\r\n"));
        assert!(ask(address, "GET /b HTTP/1.1").await.starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /a HTTP/1.1").await.starts_with("HTTP/1.1 405"));
        trigger.request();
        assert_eq!(tasks.join_all(Duration::from_secs(5)).await, Vec::<&str>::new());
    }
}
