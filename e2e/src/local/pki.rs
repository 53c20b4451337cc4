//! The certificates and kubeconfigs of a cluster, made anew at each start.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::json;

use super::layout::{API_PORT, NODE, NODE_ADDRESS, SERVICE_ADDRESS};
use crate::cluster::{Error, Result};

/// The directory with the certificates and kubeconfigs.
pub(super) struct Pki {
    dir: PathBuf,
}

impl Pki {
    /// Makes the certificates, keys and kubeconfigs of all components.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(super) fn make(state: &Path) -> Result<Self> {
        let pki = Self {
            dir: state.join("pki"),
        };
        fs::create_dir_all(&pki.dir).map_err(|error| failed(&pki.dir, &error))?;
        fs::set_permissions(&pki.dir, fs::Permissions::from_mode(0o700))
            .map_err(|error| failed(&pki.dir, &error))?;
        let ca = pki.authority("ca")?;
        // For API aggregation, without which the controllers log errors all the time.
        let front_proxy_ca = pki.authority("front-proxy-ca")?;
        let names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
            "localhost",
            "127.0.0.1",
            NODE_ADDRESS,
            SERVICE_ADDRESS,
        ];
        pki.certificate(&ca, "apiserver", "", "kube-apiserver", &names)?;
        let masters = "system:masters";
        pki.certificate(&ca, "apiserver-kubelet", masters, "kube-apiserver", &[])?;
        pki.certificate(
            &front_proxy_ca,
            "front-proxy",
            "",
            "front-proxy-client",
            &[],
        )?;
        let kubelet = format!("system:node:{NODE}");
        for (name, group, user) in [
            ("admin", masters, "admin"),
            ("controller-manager", "", "system:kube-controller-manager"),
            ("scheduler", "", "system:kube-scheduler"),
            ("kubelet", "system:nodes", kubelet.as_str()),
        ] {
            pki.certificate(&ca, name, group, user, &[])?;
            pki.write(&format!("{name}.kubeconfig"), &pki.kubeconfig_text(name))?;
        }
        let service_accounts = KeyPair::generate().map_err(|error| failed(&pki.dir, &error))?;
        pki.write("sa.key", &service_accounts.serialize_pem())?;
        pki.write("sa.pub", &service_accounts.public_key_pem())?;
        Ok(pki)
    }

    /// Returns the path of a file.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Returns the path of the kubeconfig of `admin`, `controller-manager`, `scheduler` or `kubelet`.
    pub(super) fn kubeconfig(&self, user: &str) -> PathBuf {
        self.path(&format!("{user}.kubeconfig"))
    }

    fn authority(&self, name: &str) -> Result<Issuer<'static, KeyPair>> {
        let made = || {
            let mut params = CertificateParams::new(Vec::new())?;
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![
                KeyUsagePurpose::KeyCertSign,
                KeyUsagePurpose::CrlSign,
                KeyUsagePurpose::DigitalSignature,
            ];
            params.distinguished_name.push(DnType::CommonName, name);
            let key = KeyPair::generate()?;
            let certificate = params.self_signed(&key)?;
            Ok((params, certificate, key))
        };
        let (params, certificate, key) =
            made().map_err(|error: rcgen::Error| failed(&self.path(name), &error))?;
        self.write(&format!("{name}.crt"), &certificate.pem())?;
        self.write(&format!("{name}.key"), &key.serialize_pem())?;
        Ok(Issuer::new(params, key))
    }

    fn certificate(
        &self,
        issuer: &Issuer<'_, KeyPair>,
        name: &str,
        group: &str,
        user: &str,
        names: &[&str],
    ) -> Result<()> {
        let made = || {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let mut params = CertificateParams::new(names)?;
            params.distinguished_name.push(DnType::CommonName, user);
            if !group.is_empty() {
                params
                    .distinguished_name
                    .push(DnType::OrganizationName, group);
            }
            params.key_usages = vec![
                KeyUsagePurpose::DigitalSignature,
                KeyUsagePurpose::KeyEncipherment,
            ];
            params.extended_key_usages = vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ];
            let key = KeyPair::generate()?;
            Ok((params.signed_by(&key, issuer)?, key))
        };
        let (certificate, key) =
            made().map_err(|error: rcgen::Error| failed(&self.path(name), &error))?;
        self.write(&format!("{name}.crt"), &certificate.pem())?;
        self.write(&format!("{name}.key"), &key.serialize_pem())
    }

    /// Returns a kubeconfig, in JSON, which is YAML.
    fn kubeconfig_text(&self, user: &str) -> String {
        let file = |name: String| self.path(&name);
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "local", "cluster": {
                "server": format!("https://{NODE_ADDRESS}:{API_PORT}"),
                "certificate-authority": file("ca.crt".to_owned()),
            }}],
            "users": [{"name": user, "user": {
                "client-certificate": file(format!("{user}.crt")),
                "client-key": file(format!("{user}.key")),
            }}],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": user}}],
            "current-context": "local",
        })
        .to_string()
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path(name);
        fs::write(&path, text).map_err(|error| failed(&path, &error))
    }
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::Start(format!("{}: {error}", path.display()))
}
