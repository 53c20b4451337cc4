//! A provider that serves the files of a directory: `directory [SOCKET [STORE]]`.
//!
//! The class parameter `folder` names a directory in the store. Each file below it is an object.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use fake_provider::server::{
    Code, Failure, Identity, MountResponse, Object, Provider, Request, Server, Socket, termination,
};

struct Directory {
    store: PathBuf,
}

impl Provider for Directory {
    fn identity(&self) -> Identity {
        Identity {
            name: "directory".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    async fn mount(&self, request: Request) -> Result<MountResponse, Failure> {
        let folder = request.parameter("folder").unwrap_or_default();
        if folder.is_empty() || folder.starts_with('.') || folder.contains('/') {
            let message = "the parameter folder must name a directory in the store";
            return Err(Failure::new(Code::InvalidArgument, message));
        }
        // Reading blocks; other calls go on meanwhile.
        let read = tokio::task::block_in_place(|| read(&self.store.join(folder), Path::new("")));
        let objects = read.map_err(|error| {
            let code = match error.kind() {
                io::ErrorKind::NotFound => Code::NotFound,
                io::ErrorKind::PermissionDenied => Code::PermissionDenied,
                _ => Code::Unavailable, // The driver tries again.
            };
            Failure::new(code, format!("folder {folder}: {error}"))
        })?;
        Ok(objects.into_iter().collect())
    }
}

fn read(dir: &Path, prefix: &Path) -> io::Result<Vec<Object>> {
    let mut objects = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = prefix.join(entry.file_name());
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            objects.extend(read(&entry.path(), &path)?);
        } else if metadata.is_file() {
            objects.push(Object {
                id: path.display().to_string(),
                // Not a hash of the content: the pod status shows versions to everybody.
                version: format!("{}.{}", metadata.mtime(), metadata.mtime_nsec()),
                path: path.display().to_string(),
                mode: metadata.permissions().mode() & 0o777,
                contents: fs::read(entry.path())?,
            });
        }
    }
    objects.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(objects)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = env::args().skip(1);
    let socket = arguments.next().unwrap_or("target/directory.sock".into());
    let store = arguments
        .next()
        .unwrap_or("fake-provider/examples/store".into());
    let provider = Directory {
        store: store.into(),
    };
    tracing_subscriber::fmt().init(); // Server::run logs failures.
    let server = Server::new(Socket::bind(&socket)?, provider);
    println!("serving on {socket}");
    Ok(server.run(termination()?).await?)
}
