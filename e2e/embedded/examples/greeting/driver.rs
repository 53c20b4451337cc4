//! A CSI node driver that mounts a greeting for each pod.

use std::error::Error;
use std::fs;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proto::csi::node_server::{Node, NodeServer};
use proto::csi::*;
use proto::registration::registration_server::{Registration, RegistrationServer};
use proto::registration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// Serves the driver and its registration, given the flag `--endpoint=unix://<path>`.
pub(crate) async fn run(endpoint: &str) -> Result<(), Box<dyn Error>> {
    let socket = endpoint.trim_start_matches("--endpoint=unix://");
    let [csi, registration] = [socket, "/registration/greeting-reg.sock"].map(|path| {
        // An earlier run may have left it.
        let _absent = fs::remove_file(path);
        UnixListener::bind(path).map(UnixListenerStream::new)
    });
    let node = Server::builder().add_service(NodeServer::new(Driver));
    let registrar = Server::builder().add_service(RegistrationServer::new(Driver));
    tokio::try_join!(
        node.serve_with_incoming(csi?),
        registrar.serve_with_incoming(registration?),
    )?;
    Ok(())
}

struct Driver;

#[tonic::async_trait]
impl Node for Driver {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let target = request.target_path.as_str();
        let pod = &request.volume_context["csi.storage.k8s.io/pod.name"];
        fs::create_dir_all(target)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), target, Some("tmpfs"), flags, None::<&str>)
            .map_err(|error| Status::internal(error.to_string()))?;
        fs::write(format!("{target}/greeting"), format!("Hello, {pod}!"))?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let target = request.into_inner().target_path;
        umount2(target.as_str(), MntFlags::empty())
            .map_err(|error| Status::internal(error.to_string()))?;
        fs::remove_dir(target)?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        Ok(Response::new(NodeGetCapabilitiesResponse::default()))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse {
            node_id: "node".to_owned(),
            ..NodeGetInfoResponse::default()
        }))
    }
}

#[tonic::async_trait]
impl Registration for Driver {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: "greeting.example".to_owned(),
            endpoint: "/var/lib/kubelet/plugins/greeting/csi.sock".to_owned(),
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        _: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
