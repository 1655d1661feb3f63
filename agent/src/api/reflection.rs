//! gRPC reflection, both versions of it: old tools ask the alpha.

use prost::Message;
use prost_types::FileDescriptorSet;
use tonic_reflection::server::Builder;
use transport::serve::Routes;

use super::message::UNATTESTED;

/// Files that are not described here: this socket serves nothing of them.
fn serves(file: &prost_types::FileDescriptorProto, services: &[&str]) -> bool {
    let package = file.package();
    let name = |service: &str| if package.is_empty() { service.to_owned() } else { format!("{package}.{service}") };
    file.service.is_empty() || file.service.iter().any(|service| services.contains(&name(service.name()).as_str()))
}

/// Describes `services`, by their full names, beside `routes`. If the descriptors do not allow it, there is no
/// reflection: it is a convenience.
pub(super) fn add(routes: Routes, services: &[&'static str]) -> Routes {
    let Ok(mut files) = FileDescriptorSet::decode(spiffe_proto::DESCRIPTORS) else {
        tracing::warn!("The protocol descriptors cannot be read; no reflection");
        return routes;
    };
    files.file.retain(|file| serves(file, services));
    let builder = || {
        services.iter().fold(Builder::configure().register_file_descriptor_set(files.clone()), |builder, name| {
            builder.with_service_name(*name)
        })
    };
    match (builder().build_v1(), builder().build_v1alpha()) {
        (Ok(newest), Ok(alpha)) => {
            routes.with(newest.max_decoding_message_size(UNATTESTED)).with(alpha.max_decoding_message_size(UNATTESTED))
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(error = runtime::telemetry::chain(&error), "No reflection");
            routes
        }
    }
}
