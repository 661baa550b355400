package vmtest

import (
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strings"
)

// archive writes an initramfs in the cpio "newc" format (the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst). Several archives
// one after the other are one initramfs, so what all boots share is written once.
// It is not compressed: unpacking it costs an emulated processor more than
// reading it.
type archive struct {
	w    io.Writer
	n    int64 // bytes written
	ino  int
	dirs map[string]bool
	err  error
}

func newArchive(w io.Writer) *archive {
	return &archive{w: w, dirs: map[string]bool{}}
}

// File modes of cpio, which are those of stat(2).
const (
	modeDir     = 0o040000
	modeRegular = 0o100000
	modeDevice  = 0o020000
	modeLink    = 0o120000
)

// dir adds a directory and those above it, once.
func (a *archive) dir(name string) {
	name = clean(name)
	if name == "." || a.dirs[name] {
		return
	}
	a.dir(path.Dir(name))
	a.dirs[name] = true
	a.header(name, modeDir|0o755, 0, 0, 0)
}

// bytes adds a file that holds data.
func (a *archive) bytes(name string, perm uint32, data []byte) {
	a.dir(path.Dir(clean(name)))
	a.header(clean(name), modeRegular|perm, int64(len(data)), 0, 0)
	a.write(data)
	a.pad()
}

// file adds a copy of the host's file from.
func (a *archive) file(name string, perm uint32, from string) {
	if a.err != nil {
		return
	}
	f, err := os.Open(from)
	if err != nil {
		a.err = err
		return
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		a.err = err
		return
	}
	a.dir(path.Dir(clean(name)))
	a.header(clean(name), modeRegular|perm, st.Size(), 0, 0)
	if a.err != nil {
		return
	}
	n, err := io.Copy(a.w, io.LimitReader(f, st.Size()))
	a.n += n
	if err == nil && n != st.Size() {
		err = fmt.Errorf("%s shrank while it was read", from)
	}
	a.err = err
	a.pad()
}

// device adds a character device.
func (a *archive) device(name string, perm uint32, major, minor int) {
	a.dir(path.Dir(clean(name)))
	a.header(clean(name), modeDevice|perm, 0, major, minor)
}

// link adds a symbolic link to target.
func (a *archive) link(name, target string) {
	a.dir(path.Dir(clean(name)))
	a.header(clean(name), modeLink|0o777, int64(len(target)), 0, 0)
	a.write([]byte(target))
	a.pad()
}

// close ends the archive and returns the first error of all. It does not close
// the writer.
func (a *archive) close() error {
	a.header("TRAILER!!!", 0, 0, 0, 0)
	// The kernel wants what follows to start at a multiple of four; tools write
	// blocks of 512.
	if rest := a.n % 512; rest != 0 {
		a.write(make([]byte, 512-rest))
	}
	return a.err
}

func (a *archive) header(name string, mode uint32, size int64, major, minor int) {
	if size > 0xffffffff && a.err == nil {
		a.err = fmt.Errorf("%s: %d bytes are too many for an initramfs", name, size)
	}
	a.ino++
	links := 1
	if mode&^0o7777 == modeDir {
		links = 2
	}
	a.write(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.ino, mode, 0, 0, links, 0, size, 0, 0, major, minor, len(name)+1, 0, name))
	a.pad()
}

// pad fills up to a multiple of four.
func (a *archive) pad() {
	if rest := a.n % 4; rest != 0 {
		a.write(make([]byte, 4-rest))
	}
}

func (a *archive) write(p []byte) {
	if a.err != nil {
		return
	}
	n, err := a.w.Write(p)
	a.n += int64(n)
	a.err = err
}

// tree adds the directory from of the host, with everything below it.
func (a *archive) tree(name, from string) {
	entries, err := os.ReadDir(from)
	if err != nil {
		if a.err == nil {
			a.err = err
		}
		return
	}
	a.dir(name)
	sort.Slice(entries, func(i, j int) bool { return entries[i].Name() < entries[j].Name() })
	for _, e := range entries {
		to, src := path.Join(name, e.Name()), from+"/"+e.Name()
		switch {
		case e.IsDir():
			a.tree(to, src)
		case e.Type().IsRegular():
			perm := uint32(0o644)
			if info, err := e.Info(); err == nil {
				perm = uint32(info.Mode().Perm())
			}
			a.file(to, perm, src)
		}
	}
}

// clean makes a guest's path relative, as names in an initramfs are.
func clean(name string) string {
	return path.Clean(strings.TrimLeft(name, "/"))
}
