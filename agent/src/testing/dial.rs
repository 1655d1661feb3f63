//! The wire between agent and server of tests: in-memory streams that can be cut.

use std::convert::Infallible;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::stream::BoxStream;
use hyper_util::rt::TokioIo;
use prost::Message;
use spiffe_proto::{agent, bundle};
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::server::Fake;
use crate::identity::Identity;
use crate::server_link::{Dial, DialError, Presenting};

/// One connection's view of the server, under the name of one service.
struct Face<N> {
    fake: Arc<Fake>,
    serial: Option<u64>,
    name: PhantomData<fn() -> N>,
}

impl<N> Clone for Face<N> {
    fn clone(&self) -> Self {
        Self { fake: Arc::clone(&self.fake), serial: self.serial, name: PhantomData }
    }
}

macro_rules! names {
    ($($marker:ident = $name:literal),*) => {$(
        struct $marker;
        impl NamedService for Face<$marker> { const NAME: &'static str = $name; }
    )*};
}

names!(
    Agents = "spire.api.server.agent.v1.Agent",
    Bundles = "spire.api.server.bundle.v1.Bundle",
    Entries = "spire.api.server.entry.v1.Entry",
    Svids = "spire.api.server.svid.v1.SVID",
    Syncs = "signet.sync.v2.Sync"
);

type Answer = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

/// Any function as a handler.
struct Handler<F>(F);

impl<F, Q, A, Fut> tonic::server::UnaryService<Q> for Handler<F>
where
    F: FnMut(Q) -> Fut,
    Fut: Future<Output = Result<A, Status>> + Send + 'static,
{
    type Response = A;
    type Future = Pin<Box<dyn Future<Output = Result<Response<A>, Status>> + Send>>;

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let answer = (self.0)(request.into_inner());
        Box::pin(async move { answer.await.map(Response::new) })
    }
}

impl<F, Q, A, Fut> tonic::server::StreamingService<Q> for Handler<F>
where
    F: FnMut(Request<Streaming<Q>>) -> Fut,
    Fut: Future<Output = Result<Response<BoxStream<'static, Result<A, Status>>>, Status>> + Send + 'static,
{
    type Response = A;
    type ResponseStream = BoxStream<'static, Result<A, Status>>;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Self::ResponseStream>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<Q>>) -> Self::Future {
        Box::pin((self.0)(request))
    }
}

fn unary<Q, A, F, Fut>(request: http::Request<Body>, handler: F) -> Answer
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    F: FnMut(Q) -> Fut + Send + 'static,
    Fut: Future<Output = Result<A, Status>> + Send + 'static,
{
    Box::pin(async move {
        let mut grpc = tonic::server::Grpc::new(ProstCodec::<A, Q>::default());
        Ok(grpc.unary(Handler(handler), request).await)
    })
}

fn streaming<Q, A, F, Fut>(request: http::Request<Body>, handler: F) -> Answer
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    F: FnMut(Request<Streaming<Q>>) -> Fut + Send + 'static,
    Fut: Future<Output = Result<Response<BoxStream<'static, Result<A, Status>>>, Status>> + Send + 'static,
{
    Box::pin(async move {
        let mut grpc = tonic::server::Grpc::new(ProstCodec::<A, Q>::default());
        Ok(grpc.streaming(Handler(handler), request).await)
    })
}

impl<N> tower::Service<http::Request<Body>> for Face<N> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Answer {
        let (fake, serial) = (Arc::clone(&self.fake), self.serial);
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        match method.as_str() {
            "AttestAgent" => streaming(request, move |request| Arc::clone(&fake).attest(request)),
            "RenewAgent" => unary(request, move |message| {
                let fake = Arc::clone(&fake);
                async move { fake.admit(serial).and_then(|()| fake.renew(message)) }
            }),
            "PostStatus" => unary(request, move |_: agent::PostStatusRequest| {
                let fake = Arc::clone(&fake);
                async move { fake.admit(serial).map(|()| agent::PostStatusResponse {}) }
            }),
            "GetBundle" => unary(request, move |_: bundle::GetBundleRequest| {
                let fake = Arc::clone(&fake);
                async move { Ok(fake.own_bundle()) }
            }),
            "GetFederatedBundle" => unary(request, move |message: bundle::GetFederatedBundleRequest| {
                let fake = Arc::clone(&fake);
                async move {
                    fake.admit(serial)?;
                    let found = fake.state().federated.get(&message.trust_domain).cloned();
                    found.ok_or_else(|| Status::not_found("bundle not found"))
                }
            }),
            "SyncAuthorizedEntries" => streaming(request, move |request| {
                let fake = Arc::clone(&fake);
                async move {
                    fake.admit(serial)?;
                    fake.poll(request).await
                }
            }),
            "BatchNewX509SVID" => unary(request, move |message| {
                let fake = Arc::clone(&fake);
                async move { fake.admit(serial).map(|()| fake.sign_batch(message)) }
            }),
            "NewJWTSVID" => unary(request, move |message| {
                let fake = Arc::clone(&fake);
                async move {
                    fake.state().jwt_asked += 1;
                    let answer = fake.admit(serial).and_then(|()| fake.sign_jwt(message));
                    let delay = fake.state().jwt_delay;
                    tokio::time::sleep(delay).await;
                    answer
                }
            }),
            "Subscribe" => streaming(request, move |request| Arc::clone(&fake).push(serial, request)),
            other => panic!("{other} is not served"),
        }
    }
}

/// Dials the fake server over in-memory streams.
pub(crate) struct FakeDial {
    pub fake: Arc<Fake>,
    pub identity: Identity,
}

#[async_trait::async_trait]
impl Dial for FakeDial {
    async fn dial(&self, presenting: Presenting) -> Result<Channel, DialError> {
        let unreachable = |what: &str| DialError::Unreachable(what.into());
        if self.fake.state().away {
            return Err(unreachable("connection refused"));
        }
        if self.fake.state().unknown_authority {
            return Err(DialError::UnknownAuthority("unknown issuer".into()));
        }
        let serial = match presenting {
            Presenting::Nothing => None,
            Presenting::Svid => {
                let svid = self.identity.svid().ok_or(DialError::NoBundle)?;
                if svid.svid.not_after <= self.fake.clock.now() {
                    return Err(unreachable("handshake: certificate expired"));
                }
                Some(svid.svid.serial.to_string().parse().unwrap())
            }
        };
        self.fake.state().connections += 1;
        // A wire in the middle, so that it can be cut.
        let ((near, mut left), (mut right, far)) = (tokio::io::duplex(1 << 16), tokio::io::duplex(1 << 16));
        let mut hung = self.fake.hung.subscribe();
        let wire = tokio::spawn(async move {
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut left, &mut right) => {}
                Ok(()) = hung.changed() => std::future::pending().await,
            }
        });
        self.fake.running.lock().unwrap().push(wire);
        let fake = Arc::clone(&self.fake);
        macro_rules! face {
            ($marker:ident) => {
                Face::<$marker> { fake: Arc::clone(&fake), serial, name: PhantomData }
            };
        }
        let serving = Server::builder()
            .add_service(face!(Agents))
            .add_service(face!(Bundles))
            .add_service(face!(Entries))
            .add_service(face!(Svids))
            .add_service(face!(Syncs))
            .serve_with_incoming(tokio_stream::once(Ok::<_, std::io::Error>(far)));
        tokio::spawn(serving);
        let mut near = Some(near);
        Endpoint::from_static("http://server")
            .connect_with_connector(tower::service_fn(move |_: http::Uri| {
                let near = near.take();
                async move { near.map(TokioIo::new).ok_or(std::io::Error::from(std::io::ErrorKind::NotConnected)) }
            }))
            .await
            .map_err(|error| DialError::Unreachable(Box::new(error)))
    }
}
