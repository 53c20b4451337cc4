//! The driver and registrar that the tests put at the other end of the kubelet's wires.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};

use proto::csi::node_server::Node;
use proto::csi::{self as wire, node_service_capability::rpc};
use proto::registration::registration_server::Registration;
use proto::registration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use tokio::sync::{Semaphore, mpsc};
use tonic::{Request, Response, Status};

use super::DRIVER;

/// A driver that does as it is told and remembers what it was asked.
#[derive(Clone, Default)]
pub(super) struct Fake {
    pub(super) published: Arc<Mutex<Vec<wire::NodePublishVolumeRequest>>>,
    /// `publish` and `unpublish` as they begin and end.
    pub(super) log: Arc<Mutex<Vec<&'static str>>>,
    /// Errors for the next publishes.
    pub(super) errors: Arc<Mutex<VecDeque<Status>>>,
    /// When there, every publish waits for a permit.
    pub(super) gate: Option<Arc<Semaphore>>,
    pub(super) versions: Vec<String>,
    pub(super) endpoint: String,
    pub(super) notified: Option<mpsc::UnboundedSender<RegistrationStatus>>,
}

impl Fake {
    fn log(&self, what: &'static str) {
        self.log.lock().unwrap().push(what);
    }
}

#[tonic::async_trait]
impl Node for Fake {
    async fn node_publish_volume(
        &self,
        request: Request<wire::NodePublishVolumeRequest>,
    ) -> Result<Response<wire::NodePublishVolumeResponse>, Status> {
        assert!(
            request.metadata().contains_key("grpc-timeout"),
            "a deadline is sent"
        );
        let request = request.into_inner();
        self.log("publish");
        self.published.lock().unwrap().push(request.clone());
        if let Some(gate) = &self.gate {
            gate.acquire().await.unwrap().forget();
        }
        let target = Path::new(&request.target_path);
        let first = !self.log.lock().unwrap().contains(&"published");
        assert_eq!(target.exists(), !first, "the driver makes the target");
        assert!(
            target.with_file_name("vol_data.json").exists(),
            "written before"
        );
        if let Some(error) = self.errors.lock().unwrap().pop_front() {
            return Err(error);
        }
        std::fs::create_dir_all(target)?;
        self.log("published");
        Ok(Response::new(wire::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<wire::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<wire::NodeUnpublishVolumeResponse>, Status> {
        self.log("unpublish");
        let _absent = std::fs::remove_dir(&request.get_ref().target_path);
        Ok(Response::new(wire::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<wire::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<wire::NodeGetCapabilitiesResponse>, Status> {
        let rpc = wire::node_service_capability::Rpc {
            r#type: rpc::Type::VolumeMountGroup.into(),
        };
        let capability = wire::NodeServiceCapability {
            r#type: Some(wire::node_service_capability::Type::Rpc(rpc)),
        };
        Ok(Response::new(wire::NodeGetCapabilitiesResponse {
            capabilities: vec![capability],
        }))
    }

    async fn node_get_info(
        &self,
        _: Request<wire::NodeGetInfoRequest>,
    ) -> Result<Response<wire::NodeGetInfoResponse>, Status> {
        Ok(Response::new(wire::NodeGetInfoResponse {
            node_id: "id-1".into(),
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl Registration for Fake {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".into(),
            name: DRIVER.into(),
            endpoint: self.endpoint.clone(),
            supported_versions: self.versions.clone(),
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        if let Some(notified) = &self.notified {
            notified.send(request.into_inner()).unwrap();
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
