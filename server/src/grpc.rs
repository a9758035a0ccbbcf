//! Serving one gRPC service with health and reflection beside it.

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use farpage_proto::FILE_DESCRIPTOR_SET;
use farpage_proto::transport::{Listener, server_builder};
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

/// How long requests in progress may take to end after a shutdown was asked for.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

/// Why serving ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The descriptors that this program was built with are broken.
    #[error("reflection: {0}; rebuild this program")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The server failed.
    #[error("gRPC server: {0}; start it again")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves until `shutdown` completes and requests in progress have ended, or [`DRAIN_DEADLINE`] has passed.
pub(crate) async fn serve<S>(
    listener: Listener,
    service: S,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
        + NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<S>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = server_builder()
        .add_service(health_service)
        .add_service(reflection)
        .add_service(service)
        .serve_with_incoming_shutdown(listener.incoming(), async {
            // Dropped or sent, the end is meant.
            let _ = stopped.await;
        });
    tokio::pin!(server);
    tokio::select! {
        ended = &mut server => return Ok(ended?),
        () = shutdown => {}
    }
    health.set_not_serving::<S>().await;
    drop(stop);
    match tokio::time::timeout(DRAIN_DEADLINE, server).await {
        Ok(ended) => Ok(ended?),
        // Long-lived streams (health watches, reflection) end with the process.
        Err(_) => Ok(()),
    }
}
