//! Network devices, addresses and routes, by rtnetlink, in whichever namespace the thread is in.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use futures_util::TryStreamExt as _;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};

/// An address and the length of its network's prefix.
pub(super) type Address = (IpAddr, u8);

/// The index of `lo` in every network namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

/// A bridge's hardware address, locally administered. Without one of its own a bridge takes the
/// lowest of its ports', which changes when a host joins: those already there then send to an
/// address that nobody has until they ask again, seconds later.
const BRIDGE_ADDRESS: [u8; 6] = [0x02, b'w', b'e', b'f', b't', 0x00];

/// A new network namespace, with nothing in it but `lo`.
pub(super) fn new_namespace() -> io::Result<OwnedFd> {
    on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(std::fs::File::open("/proc/thread-self/ns/net")?.into())
    })
}

/// Runs `body` on a thread of its own in `namespace`.
pub(super) fn within<T: Send>(
    namespace: BorrowedFd<'_>,
    body: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    on_a_thread(|| {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        body()
    })
}

/// A thread that changed its namespace must not be used for anything else.
fn on_a_thread<T: Send>(body: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".to_owned());
        thread
            .spawn_scoped(scope, body)?
            .join()
            .unwrap_or_else(|_| {
                Err(io::Error::other(
                    "the thread that worked in a network namespace panicked",
                ))
            })
    })
}

/// Makes the bridge if it is not there, with `addresses`, and sets it and `lo` up.
pub(super) fn lay_bridge(name: &str, addresses: &[Address]) -> io::Result<()> {
    talk(async |handle| {
        match handle
            .link()
            .add(
                LinkBridge::new(name)
                    .address(BRIDGE_ADDRESS.to_vec())
                    .build(),
            )
            .execute()
            .await
        {
            Ok(()) => {}
            Err(error) if os_error(&error) == Some(libc::EEXIST) => {}
            Err(error) => return Err(to_io(error)),
        }
        let index = index_of(&handle, name).await?;
        address(&handle, index, addresses).await?;
        set_up(&handle, LOOPBACK).await?;
        set_up(&handle, index).await
    })
}

/// Deletes a host's near device, and with it the far one.
pub(super) fn cut(near: &str) -> io::Result<()> {
    talk(async |handle| {
        let index = index_of(&handle, near).await?;
        handle.link().del(index).execute().await.map_err(to_io)
    })
}

/// Deletes a bridge unless something is still joined to it.
pub(super) fn take_up_bridge(name: &str) -> io::Result<()> {
    talk(async |handle| {
        let index = index_of(&handle, name).await?;
        let mut links = handle.link().get().execute();
        let mut joined = false;
        while let Some(link) = links.try_next().await.map_err(to_io)? {
            joined |= link.attributes.contains(&LinkAttribute::Controller(index));
        }
        if joined {
            return Ok(());
        }
        handle.link().del(index).execute().await.map_err(to_io)
    })
}

/// Joins `namespace` to `bridge` by a veth pair, whose near end is called `near`. `Ok(false)` when
/// that name is taken.
pub(super) fn join(bridge: &str, near: &str, namespace: BorrowedFd<'_>) -> io::Result<bool> {
    let far = format!("{near}p");
    talk(async |handle| {
        match handle
            .link()
            .add(LinkVeth::new(near, &far).build())
            .execute()
            .await
        {
            Ok(()) => {}
            Err(error) if os_error(&error) == Some(libc::EEXIST) => return Ok(false),
            Err(error) => return Err(to_io(error)),
        }
        let bridge = index_of(&handle, bridge).await?;
        let near = index_of(&handle, near).await?;
        let far = index_of(&handle, &far).await?;
        // The far end is called eth0 where it arrives.
        let moved = LinkUnspec::new_with_index(far)
            .name("eth0")
            .setns_by_fd(namespace.as_raw_fd())
            .build();
        handle.link().set(moved).execute().await.map_err(to_io)?;
        let joined = LinkUnspec::new_with_index(near)
            .controller(bridge)
            .up()
            .build();
        handle.link().set(joined).execute().await.map_err(to_io)?;
        Ok(true)
    })
}

/// Gives the host in `namespace` its addresses and default routes.
pub(super) fn furnish(
    namespace: BorrowedFd<'_>,
    addresses: &[Address],
    gateways: &[IpAddr],
) -> io::Result<()> {
    within(namespace.as_fd(), || {
        talk(async |handle| {
            let index = index_of(&handle, "eth0").await?;
            address(&handle, index, addresses).await?;
            set_up(&handle, LOOPBACK).await?;
            set_up(&handle, index).await?;
            for gateway in gateways {
                let everything: IpAddr = match gateway {
                    IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                    IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
                };
                let route = RouteMessageBuilder::<IpAddr>::new()
                    .destination_prefix(everything, 0)
                    .and_then(|route| route.gateway(*gateway))
                    .map_err(io::Error::other)?;
                handle
                    .route()
                    .add(route.build())
                    .execute()
                    .await
                    .map_err(to_io)?;
            }
            Ok(())
        })
    })
}

/// Sets the device of the host in `namespace` down.
pub(super) fn unplug(namespace: BorrowedFd<'_>) -> io::Result<()> {
    within(namespace, || {
        talk(async |handle| {
            let index = index_of(&handle, "eth0").await?;
            let down = LinkUnspec::new_with_index(index).down().build();
            handle.link().set(down).execute().await.map_err(to_io)
        })
    })
}

async fn address(handle: &Handle, index: u32, addresses: &[Address]) -> io::Result<()> {
    for (address, length) in addresses {
        let mut request = handle.address().add(index, *address, *length).replace();
        // Usable at once: nobody else is here to have the same address.
        let flags = AddressAttribute::Flags(AddressFlags::Nodad);
        request.message_mut().attributes.push(flags);
        request.execute().await.map_err(to_io)?;
    }
    Ok(())
}

async fn set_up(handle: &Handle, index: u32) -> io::Result<()> {
    let up = LinkUnspec::new_with_index(index).up().build();
    handle.link().set(up).execute().await.map_err(to_io)
}

async fn index_of(handle: &Handle, name: &str) -> io::Result<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let link = links.try_next().await.map_err(to_io)?;
    Ok(link.ok_or(io::ErrorKind::NotFound)?.header.index)
}

/// Runs a conversation with the kernel, on a thread of its own so that it can be called from
/// within a runtime too.
fn talk<T: Send>(act: impl AsyncFnOnce(Handle) -> io::Result<T> + Send) -> io::Result<T> {
    on_a_thread(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            act(handle).await
        })
    })
}

fn os_error(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().abs()),
        _ => None,
    }
}

fn to_io(error: rtnetlink::Error) -> io::Error {
    os_error(&error).map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}
