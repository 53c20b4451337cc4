//! Container images of this workspace's executables, made without a builder or a registry.
//!
//! An image contains static executables and nothing else (`FROM scratch`). It is written in the
//! format of `docker save`, which `docker load`, `kind load image-archive` and `ctr images import`
//! read. The same executable gives the same bytes.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::binaries::{self, cargo_build, target_dir};
use crate::tree::hex;

/// Names the profile of the images' executables: `release`, or that of tests when absent.
pub const PROFILE_VARIABLE: &str = "E2E_PROFILE";

/// The driver's image, as `deploy/` names it.
pub const DRIVER: &str = concat!("secrets-store-csi:", env!("CARGO_PKG_VERSION"));
/// The image of the provider in `e2e/manifests`.
pub const FAKE_PROVIDER: &str = "fake-provider:e2e";
/// The image of the scenarios' pods.
pub const PROBE: &str = "probe:e2e";
/// The image of the fakes of stores in `e2e/manifests/providers`.
pub const STORES: &str = "e2e:e2e";
/// The image that keeps a pod's namespaces alive where the container runtime cannot pull one.
pub const PAUSE: &str = "pause:e2e";

/// An image in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Repository and tag, as manifests name it.
    pub name: String,
    /// The path of the archive.
    pub archive: PathBuf,
}

/// All images of this workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// [`DRIVER`], [`FAKE_PROVIDER`], [`PROBE`] and [`PAUSE`].
    pub archives: Vec<Image>,
    /// The path of the static `probe`.
    pub probe: PathBuf,
}

/// The reason why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An executable does not build.
    #[error(transparent)]
    Build(#[from] binaries::Error),
    /// An executable cannot be read, or the archive cannot be written.
    #[error("image {name}: {path}: {source}", path = path.display())]
    Write {
        /// The image.
        name: String,
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

/// Builds the static executables and writes the images below cargo's target directory.
///
/// Calls `progress` with the name of each crate that is compiled. Blocks, on a fresh clone for
/// minutes.
///
/// # Errors
/// When an executable does not build, or a file cannot be written.
pub fn build(progress: impl FnMut(&str)) -> Result<Images, Error> {
    let executables =
        Executables::build(&["secrets-store-csi", "fake-provider", "probe"], progress)?;
    let mut archives = Vec::new();
    for (image, executable, arguments) in [
        (DRIVER, "secrets-store-csi", &[][..]),
        (FAKE_PROVIDER, "fake-provider", &[]),
        (PROBE, "probe", &[]),
        (PAUSE, "probe", &["sleep"]),
    ] {
        archives.push(of_executable(
            image,
            executables.get(executable)?,
            arguments,
        )?);
    }
    Ok(Images {
        archives,
        probe: executables.get("probe")?.clone(),
    })
}

/// Builds the static executable `e2e` and writes its image, in which the fakes of stores run.
///
/// # Errors
/// As of [`build`].
pub fn of_stores(progress: impl FnMut(&str)) -> Result<Image, Error> {
    let executables = Executables::build(&["e2e"], progress)?;
    of_executable(STORES, executables.get("e2e")?, &[])
}

/// Static executables of this workspace.
struct Executables {
    paths: BTreeMap<String, PathBuf>,
    command: String,
}

impl Executables {
    fn build(names: &[&str], progress: impl FnMut(&str)) -> Result<Self, Error> {
        // The same packages for all, because the features of dependencies follow from them.
        let mut args = vec!["-p", "driver", "-p", "fake-provider", "-p", "e2e"];
        args.extend(names.iter().flat_map(|name| ["--bin", name]));
        let (paths, command) = build_static(&args, progress)?;
        Ok(Self { paths, command })
    }

    fn get(&self, name: &'static str) -> Result<&PathBuf, binaries::Error> {
        self.paths
            .get(name)
            .ok_or_else(|| binaries::Error::Missing {
                name,
                place: format!("the output of {}", self.command),
            })
    }
}

/// Runs `cargo build` for static executables. Returns their paths by name, and the command, for error
/// messages.
///
/// # Errors
/// When cargo cannot be run or something does not build.
pub(crate) fn build_static(
    args: &[&str],
    progress: impl FnMut(&str),
) -> Result<(BTreeMap<String, PathBuf>, String), binaries::Error> {
    // A directory of its own, because the flags change every dependency.
    let target = target_dir().join("static");
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut args = args.to_vec();
    args.extend(["--target", &triple]);
    if std::env::var(PROFILE_VARIABLE).is_ok_and(|profile| profile == "release") {
        args.push("--release");
    }
    // Because a target is named, these flags do not apply to build scripts, which have to be dynamic.
    let variables = [
        ("RUSTFLAGS", OsString::from("-C target-feature=+crt-static")),
        ("CARGO_TARGET_DIR", target.into_os_string()),
    ];
    cargo_build(&args, &variables, progress)
}

/// Writes an image that holds one static executable at `/` and runs it.
///
/// `arguments` come before those that a manifest gives.
///
/// # Errors
/// When the executable cannot be read or the archive cannot be written.
pub fn of_executable(name: &str, executable: &Path, arguments: &[&str]) -> Result<Image, Error> {
    let file_name = executable.file_name().unwrap_or_default().to_string_lossy();
    of_executables(name, &[(&file_name, executable)], arguments)
}

/// Writes an image with several static executables; each has a path in the image, without the first
/// `/`. The image runs the first.
///
/// # Errors
/// As of [`of_executable`].
pub fn of_executables(
    name: &str,
    executables: &[(&str, &Path)],
    arguments: &[&str],
) -> Result<Image, Error> {
    let dir = target_dir().join("images");
    let archive = dir.join(format!("{}.tar", name.replace(['/', ':'], "_")));
    let failed = |path: &Path| {
        let (name, path) = (name.to_owned(), path.to_owned());
        move |source| Error::Write { name, path, source }
    };
    fs::create_dir_all(&dir).map_err(failed(&dir))?;
    let mut programs = Vec::new();
    for (path, executable) in executables {
        if !is_static(executable).map_err(failed(executable))? {
            let reason = "it needs a dynamic linker, and there is none in an image without files";
            return Err(failed(executable)(io::Error::other(reason)));
        }
        programs.push((*path, stripped(executable).map_err(failed(executable))?));
    }
    // Renamed into place, so that no reader finds half an archive.
    let written = tempfile::NamedTempFile::new_in(&dir)
        .and_then(|mut file| {
            write_archive(&mut file, name, &programs, arguments)?;
            Ok(file)
        })
        .map_err(failed(&archive))?;
    written
        .persist(&archive)
        .map_err(|error| failed(&archive)(error.error))?;
    Ok(Image {
        name: name.to_owned(),
        archive,
    })
}

/// Returns an executable without its symbols, which are most of a test build. Where there is no
/// `strip`, returns it as it is.
fn stripped(executable: &Path) -> io::Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let small = dir.path().join("stripped");
    let outcome = Command::new("strip")
        .arg("-o")
        .arg(&small)
        .arg(executable)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match outcome {
        Ok(status) if status.success() => fs::read(small),
        _ => fs::read(executable),
    }
}

fn write_archive(
    to: &mut impl Write,
    image: &str,
    programs: &[(&str, Vec<u8>)],
    arguments: &[&str],
) -> io::Result<()> {
    let mut layer = Vec::new();
    for (path, program) in programs {
        tar_entry(&mut layer, path, 0o755, program)?;
    }
    tar_end(&mut layer)?;
    let program_path = format!("/{}", programs.first().map_or("", |(path, _)| *path));
    let entrypoint: Vec<&str> = std::iter::once(program_path.as_str())
        .chain(arguments.iter().copied())
        .collect();
    let config = json!({
        "architecture": match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        },
        "os": "linux",
        // Without a time the archive does not depend on when it was made.
        "created": "1970-01-01T00:00:00Z",
        "config": {"Entrypoint": entrypoint},
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
    });
    let manifest = json!([{
        "Config": "config.json",
        "RepoTags": [image],
        "Layers": ["layer.tar"],
    }]);
    tar_entry(to, "manifest.json", 0o644, manifest.to_string().as_bytes())?;
    tar_entry(to, "config.json", 0o644, config.to_string().as_bytes())?;
    tar_entry(to, "layer.tar", 0o644, &layer)?;
    tar_end(to)
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// The block size of a tar archive.
const BLOCK: usize = 512;

/// Writes a regular file that belongs to root and is from 1970, in the POSIX `ustar` format.
fn tar_entry(to: &mut impl Write, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
    let mut header = [0_u8; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| {
        header[at..at + bytes.len()].copy_from_slice(bytes);
    };
    if name.len() > 100 {
        return Err(io::Error::other(format!("{name:?} is too long for tar")));
    }
    put(0, name.as_bytes());
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    put(124, format!("{:011o}", content.len()).as_bytes());
    put(136, b"00000000000");
    // The checksum counts itself as spaces.
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().copied().map(u32::from).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    to.write_all(&header)?;
    to.write_all(content)?;
    let padding = content.len().next_multiple_of(BLOCK) - content.len();
    to.write_all(&[0; BLOCK][..padding])
}

fn tar_end(to: &mut impl Write) -> io::Result<()> {
    to.write_all(&[0; 2 * BLOCK])
}

/// Returns whether a 64-bit ELF executable runs without a dynamic linker.
fn is_static(executable: &Path) -> io::Result<bool> {
    /// The type of the program header that contains the dynamic linker's path.
    const PT_INTERP: u32 = 3;
    let mut file = File::open(executable)?;
    let mut header = [0; 64];
    file.read_exact(&mut header)?;
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let mut offset = [0; 8];
    offset.copy_from_slice(&header[32..40]);
    let (size, count) = (u64::from(u16_at(54)), u64::from(u16_at(56)));
    for number in 0..count {
        file.seek(SeekFrom::Start(u64::from_le_bytes(offset) + number * size))?;
        let mut kind = [0; 4];
        file.read_exact(&mut kind)?;
        if u32::from_le_bytes(kind) == PT_INTERP {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binaries::workspace;

    fn archive(program: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let programs = [("probe", program.to_vec())];
        write_archive(&mut bytes, "probe:e2e", &programs, &["sleep"]).unwrap();
        bytes
    }

    /// The system's tar checks the checksums.
    #[test]
    fn tar_and_container_runtimes_read_an_archive() {
        let dir = tempfile::tempdir().unwrap();
        let outer = dir.path().join("image.tar");
        fs::write(&outer, archive(b"not really a program")).unwrap();
        for file in ["image.tar", "layer.tar"] {
            let status = Command::new("tar")
                .args(["-xpf", file])
                .current_dir(&dir)
                .status();
            assert!(status.unwrap().success(), "{file}");
        }
        let program = dir.path().join("probe");
        assert_eq!(fs::read(&program).unwrap(), b"not really a program");
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&program).unwrap().permissions());
        assert_eq!(mode & 0o7777, 0o755);

        let read = |name: &str| -> serde_json::Value {
            serde_json::from_slice(&fs::read(dir.path().join(name)).unwrap()).unwrap()
        };
        let layer = fs::read(dir.path().join("layer.tar")).unwrap();
        let config = read("config.json");
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(&layer));
        assert_eq!(config["config"]["Entrypoint"], json!(["/probe", "sleep"]));
        assert_eq!(read("manifest.json")[0]["RepoTags"][0], "probe:e2e");
    }

    #[test]
    fn the_same_program_gives_the_same_archive() {
        assert_eq!(archive(b"a"), archive(b"a"));
        assert_ne!(archive(b"a"), archive(b"b"));
    }

    #[test]
    fn the_driver_is_named_as_the_manifest_names_it() {
        let manifest = workspace().join("deploy/secrets-store-csi-driver.yaml");
        let manifest = fs::read_to_string(manifest).unwrap();
        assert!(manifest.contains(&format!("image: {DRIVER}\n")));
    }

    /// A test binary is linked dynamically.
    #[test]
    fn a_dynamic_executable_is_told_from_a_static_one() {
        assert!(!is_static(&std::env::current_exe().unwrap()).unwrap());
    }
}
