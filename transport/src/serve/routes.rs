//! Which service a call is for: the first half of its path (gRPC over HTTP/2, "Requests").

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;

use super::intake::Expected;

/// A response that is on its way.
pub type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// A service whose type is forgotten.
trait Serve: Send + Sync {
    fn serve(&self, request: Request<Body>) -> Answer;
}

impl<S> Serve for S
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send,
{
    fn serve(&self, request: Request<Body>) -> Answer {
        let mut service = self.clone();
        Box::pin(async move {
            poll_fn(|context| service.poll_ready(context)).await?;
            service.call(request).await
        })
    }
}

/// The services of a listener by their names; clones share them. A call of any other service is answered
/// Unimplemented.
///
/// A router for arbitrary paths would cost each call several copies of it and of its body's type.
#[derive(Clone, Default)]
pub struct Routes {
    services: Arc<Vec<(&'static str, Arc<dyn Serve>)>>,
    expected: &'static [Expected],
}

impl std::fmt::Debug for Routes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.services.iter().map(|(name, _)| name)).finish()
    }
}

impl Routes {
    /// One more service; it takes the place of an earlier one of the same name.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send,
    {
        let services = Arc::make_mut(&mut self.services);
        services.retain(|(name, _)| *name != S::NAME);
        services.push((S::NAME, Arc::new(service)));
        self
    }

    /// What requests of these methods bring, few of all that there are: those that strangers may call.
    #[must_use]
    pub fn expecting(self, expected: &'static [Expected]) -> Self {
        Self { expected, ..self }
    }

    pub(super) fn expected(&self, path: &str) -> Option<&'static Expected> {
        self.expected.iter().find(|expected| expected.path == path)
    }

    fn find(&self, path: &str) -> Option<&Arc<dyn Serve>> {
        let (service, _) = path.strip_prefix('/')?.split_once('/')?;
        self.services.iter().find(|(name, _)| *name == service).map(|(_, service)| service)
    }
}

impl Service<Request<Body>> for Routes {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        match self.find(request.uri().path()) {
            Some(service) => service.serve(request),
            None => Box::pin(async { Ok(Status::unimplemented("unknown service").into_http()) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[derive(Clone)]
    struct Named<const N: u16>;

    impl NamedService for Named<1> {
        const NAME: &'static str = "one.v1.One";
    }

    impl NamedService for Named<2> {
        const NAME: &'static str = "one.v1.One";
    }

    impl NamedService for Named<3> {
        const NAME: &'static str = "Three";
    }

    impl<const N: u16> Service<Request<Body>> for Named<N> {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> Self::Future {
            let mut response = Response::new(Body::empty());
            response.headers_mut().insert("number", N.into());
            std::future::ready(Ok(response))
        }
    }

    #[tokio::test]
    async fn calls_reach_the_service_of_exactly_their_name() {
        let routes = Routes::default().with(Named::<1>).with(Named::<3>).with(Named::<2>);
        assert_eq!(format!("{routes:?}"), r#"{"Three", "one.v1.One"}"#);
        let called = async |path: &str| {
            let mut routes = routes.clone();
            let Ok(response) = routes.call(Request::builder().uri(path).body(Body::empty()).unwrap()).await;
            let number = response.headers().get("number").map(|number| number.to_str().unwrap().to_owned());
            number.ok_or_else(|| Status::from_header_map(response.headers()).unwrap().code())
        };
        assert_eq!(called("/one.v1.One/Any").await.as_deref(), Ok("2"));
        assert_eq!(called("/Three/").await.as_deref(), Ok("3"));
        for path in ["/one.v1.one/Any", "/one.v1.One", "/one.v1.OneTwo/Any", "//one.v1.One/Any", "/", "/Thre/e", "*"] {
            assert_eq!(called(path).await, Err(Code::Unimplemented), "{path}");
        }
    }
}
