//! A loopback HTTP server that speaks as much of the hub's API as a download needs, and misbehaves on request.
//!
//! It answers `GET /api/models/{id}/revision/{rev}`, `GET /api/models/{id}/tree/{commit}` (two pages), and `HEAD` and
//! `GET /{id}/resolve/{commit}/{path}`. It binds 127.0.0.1 only, and ends when it is dropped.

use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::thread::JoinHandle;
use std::time::Duration;

pub const REPO: &str = "Owner/Tiny-Image";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What to do with the next `GET` of a file instead of sending it.
#[derive(Clone)]
pub enum Fault {
    /// Half of the body, then the connection closes.
    Cut,
    /// Half of the body, then nothing more.
    Stall,
    /// The right length, one byte changed.
    Corrupt,
    /// Another answer: status, `X-Error-Code`, body.
    Answer(u16, &'static str, &'static str),
}

#[derive(Default)]
pub struct Hub {
    /// The repository's files.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Faults of the next `GET`s of a file, in order.
    pub faults: HashMap<String, Vec<Fault>>,
    /// The same answer to every request: status, `X-Error-Code`, message.
    pub refuse: Option<(u16, &'static str, &'static str)>,
    /// Requests must carry this token.
    pub token: Option<&'static str>,
    /// Listed, but answered with 404.
    pub vanished: Option<&'static str>,
    /// Listed with this size instead of their own.
    pub claimed_sizes: HashMap<String, u64>,
    /// Every request, as `METHOD path`.
    pub log: Vec<String>,
}

pub struct Server {
    pub hub: Arc<Mutex<Hub>>,
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        bypass_proxies();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let hub = Arc::new(Mutex::new(Hub { files, ..Hub::default() }));
        let stop = Arc::new(AtomicBool::new(false));
        let accepting = std::thread::spawn({
            let (hub, stop) = (hub.clone(), stop.clone());
            move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let (hub, stop) = (hub.clone(), stop.clone());
                    // A client that goes away in the middle is part of the game.
                    std::thread::spawn(move || stream.and_then(|s| answer(s, address, &hub, &stop)));
                }
            }
        });
        Self { hub, address, stop, accepting: Some(accepting) }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Files whose bodies were asked for, sorted, with repetitions.
    pub fn bodies_sent(&self) -> Vec<String> {
        let prefix = format!("GET /{REPO}/resolve/{COMMIT}/");
        let hub = self.hub.lock().unwrap();
        let mut sent: Vec<String> = hub.log.iter().filter_map(|l| l.strip_prefix(&prefix)).map(String::from).collect();
        sent.sort();
        sent
    }

    pub fn num_requests(&self) -> usize {
        self.hub.lock().unwrap().log.len()
    }

    pub fn fault(&self, path: &str, faults: &[Fault]) {
        self.hub.lock().unwrap().faults.insert(path.into(), faults.to_vec());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.accepting.take() {
            let _ = thread.join();
        }
    }
}

/// An HTTP proxy of the machine would not find our loopback address.
fn bypass_proxies() {
    static ONCE: Once = Once::new();
    // SAFETY: std's own readers of the environment take its lock, and nothing in these tests reads it through C.
    ONCE.call_once(|| unsafe { std::env::set_var("NO_PROXY", "127.0.0.1") });
}

fn answer(stream: TcpStream, address: SocketAddr, hub: &Mutex<Hub>, stop: &AtomicBool) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut token = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line == "\r\n" {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("authorization")
        {
            token = value.trim().trim_start_matches("Bearer ").to_string();
        }
    }
    let mut words = request.split_whitespace();
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(()) };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut hub = hub.lock().unwrap();
    hub.log.push(format!("{method} {path}"));
    let mut reply = Reply { stream, head: method == "HEAD" };

    if let Some((status, code, message)) = hub.refuse {
        return reply.error(status, code, message);
    }
    if hub.token.is_some_and(|wanted| wanted != token) {
        return reply.error(401, "", "Invalid username or password.");
    }
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{REPO}/revision/")) {
        return match revision {
            "main" | "v1.0" | "refs%2Fpr%2F1" => {
                reply.send(200, &[], format!(r#"{{"id": "{REPO}", "sha": "{COMMIT}"}}"#).as_bytes())
            }
            _ => reply.error(404, "RevisionNotFound", "Invalid rev id"),
        };
    }
    if path == format!("/api/models/{REPO}/tree/{COMMIT}") {
        // Two pages, as long listings have.
        let half = hub.files.len() / 2;
        let second = query.contains("cursor");
        let page = hub.files.iter().enumerate().filter(|(i, _)| (*i >= half) == second);
        let entries: Vec<serde_json::Value> = page
            .map(|(_, (path, bytes))| {
                let size = hub.claimed_sizes.get(path).copied().unwrap_or(bytes.len() as u64);
                serde_json::json!({"type": "file", "oid": "0", "size": size, "path": path})
            })
            .collect();
        let next = format!("Link: <http://{address}{path}?recursive=true&cursor=1>; rel=\"next\"");
        let headers = if second { vec![] } else { vec![next] };
        return reply.send(200, &headers, serde_json::Value::from(entries).to_string().as_bytes());
    }
    if let Some(file) = path.strip_prefix(&format!("/{REPO}/resolve/{COMMIT}/")) {
        let Some(bytes) = hub.files.get(file).cloned().filter(|_| hub.vanished != Some(file)) else {
            return reply.error(404, "EntryNotFound", "Entry not found");
        };
        let fault = match hub.faults.get_mut(file) {
            Some(faults) if method == "GET" && !faults.is_empty() => Some(faults.remove(0)),
            _ => None,
        };
        drop(hub);
        return reply.file(file, &bytes, fault, stop);
    }
    reply.error(404, "RepoNotFound", "Repository not found")
}

struct Reply {
    stream: TcpStream,
    head: bool,
}

impl Reply {
    fn error(&mut self, status: u16, code: &str, message: &str) -> std::io::Result<()> {
        let mut headers = vec![format!("X-Error-Message: {message}")];
        if !code.is_empty() {
            headers.push(format!("X-Error-Code: {code}"));
        }
        self.send(status, &headers, message.as_bytes())
    }

    fn send(&mut self, status: u16, headers: &[String], body: &[u8]) -> std::io::Result<()> {
        self.start(status, headers, body.len())?;
        if !self.head {
            self.stream.write_all(body)?;
        }
        self.stream.flush()
    }

    fn start(&mut self, status: u16, headers: &[String], length: usize) -> std::io::Result<()> {
        write!(self.stream, "HTTP/1.1 {status} x\r\nContent-Length: {length}\r\nConnection: close\r\n")?;
        for header in headers {
            write!(self.stream, "{header}\r\n")?;
        }
        write!(self.stream, "\r\n")
    }

    fn file(&mut self, path: &str, bytes: &[u8], fault: Option<Fault>, stop: &AtomicBool) -> std::io::Result<()> {
        let sha: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        let mut headers = vec![format!("X-Repo-Commit: {COMMIT}")];
        if path.ends_with(".safetensors") {
            // As for files in large-file storage, whose own tag is the SHA-256.
            headers.push(format!("X-Linked-ETag: \"{sha}\""));
            headers.push(format!("X-Linked-Size: {}", bytes.len()));
            headers.push("ETag: \"another\"".into());
        } else {
            headers.push(format!("ETag: \"{}\"", &sha[..40]));
        }
        let half = bytes.len() / 2;
        match fault {
            None => self.send(200, &headers, bytes),
            Some(Fault::Answer(status, code, body)) => self.error(status, code, body),
            Some(Fault::Corrupt) => {
                let mut wrong = bytes.to_vec();
                wrong[half] ^= 1;
                self.send(200, &headers, &wrong)
            }
            Some(Fault::Cut) => {
                self.start(200, &headers, bytes.len())?;
                self.stream.write_all(&bytes[..half])?;
                self.stream.shutdown(std::net::Shutdown::Both)
            }
            Some(Fault::Stall) => {
                self.start(200, &headers, bytes.len())?;
                self.stream.write_all(&bytes[..half])?;
                self.stream.flush()?;
                while !stop.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(())
            }
        }
    }
}
